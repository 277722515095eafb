// A training step of a wrapped block on a CPU: y <- x + tau (y - x) in the place of y = B(x), and its gradient in one
// pass.
//
// torch's own operations write a state where none was, and go six times through states that have left the cache since
// the forward pass. Here, with g the gradient of the result z,
//
//     dtau = <g, y - x> = <g, z - x> / tau,    dy = tau g,    dx = (1 - tau) g,
//
// so that y need not be kept; and where the block ends in y = x + r, r gets tau g and x the whole of g, for its part by
// way of y is tau g. Nothing is done where anyone else could see y, or might want something else: `step` returns
// false, and the caller takes torch's operations. What is left: who changes z behind torch's back (by z.data, by NumPy)
// gets another gradient of tau.

#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstring>
#include <mutex>
#include <numeric>
#include <typeindex>

namespace {

using at::Tensor;
using at::TensorBase;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr int64_t PART = 1 << 13;       // elements of a sum that one thread takes at a time
constexpr double SMALLEST = 1.0 / 16;   // |tau| from which z - x, divided by tau, is as good as y - x
enum Seen : uint8_t { NOTHING, LEFT, CHANGED };  // what became of a block's output until its gradient came

// Vectors of 64 bytes, whatever the processor has.
template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(64)));
};
template <typename T>
using Lanes = typename Vector<T>::type;
template <typename T>
constexpr int64_t WIDTH = sizeof(Lanes<T>) / sizeof(T);

template <typename T>
Lanes<T> at(const T* address) {
  Lanes<T> lanes;
  std::memcpy(&lanes, address, sizeof lanes);
  return lanes;
}

// y <- x + tau (y - x), in the two forms of torch.lerp, and to the same bits.
template <typename T>
void blend(const Tensor& state, const Tensor& output, double tau) {
  const T* x = state.const_data_ptr<T>();
  T *y = output.mutable_data_ptr<T>(), factor = tau;
  bool small = std::abs(factor) < T(0.5);
  T by = small ? factor : factor - 1;
  const T* base = small ? x : y;
  at::parallel_for(0, state.numel(), 4 * PART, [=](int64_t i, int64_t end) {
    for (; i + WIDTH<T> <= end; i += WIDTH<T>) {
      Lanes<T> from = at<T>(x + i), to = at<T>(y + i), result = by * (to - from) + at<T>(base + i);
      std::memcpy(y + i, &result, sizeof result);
    }
    for (; i < end; i++) y[i] = by * (y[i] - x[i]) + base[i];
  });
}

// dy = tau g and dx = (1 - tau) g, where they are defined; returns <g, z - x>, summed in an order that depends on the
// size alone.
template <typename T>
double differentiate(
    const Tensor& gradient, const Tensor& result, const Tensor& state, double tau, const TensorBase& dy,
    const TensorBase& dx) {
  const T *g = gradient.const_data_ptr<T>(), *z = result.const_data_ptr<T>(), *x = state.const_data_ptr<T>();
  T* to_y = dy.defined() ? dy.mutable_data_ptr<T>() : nullptr;
  T* to_x = dx.defined() ? dx.mutable_data_ptr<T>() : nullptr;
  T factor = tau, other = 1 - factor;
  int64_t size = gradient.numel();
  std::vector<double> sums((size + PART - 1) / PART);
  at::parallel_for(0, sums.size(), 2, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; part++) {
      int64_t i = part * PART, end = std::min(size, i + PART);
      Lanes<T> lanes[4] = {};
      for (; i + 4 * WIDTH<T> <= end; i += 4 * WIDTH<T>) {
        for (int k = 0; k < 4; k++) {
          int64_t here = i + k * WIDTH<T>;
          Lanes<T> slope = at<T>(g + here);
          lanes[k] += slope * (at<T>(z + here) - at<T>(x + here));
          Lanes<T> for_y = slope * factor, for_x = slope * other;
          if (to_y) std::memcpy(to_y + here, &for_y, sizeof for_y);
          if (to_x) std::memcpy(to_x + here, &for_x, sizeof for_x);
        }
      }
      Lanes<T> all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
      double sum = 0;
      for (int k = 0; k < WIDTH<T>; k++) sum += all[k];
      for (; i < end; i++) {
        sum += g[i] * (z[i] - x[i]);
        if (to_y) to_y[i] = factor * g[i];
        if (to_x) to_x[i] = other * g[i];
      }
      sums[part] = sum;
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// What is known from a state that nobody else holds: its type in Python; how often it is referred to where `call` is
// called, by Python and by C++, and its node; what kind of tensor it is; and the type of the node of x + r.
struct Example {
  PyTypeObject* type = nullptr;
  Py_ssize_t python = 0;
  size_t native = 0, node = 0;
  c10::DispatchKeySet keys;
  std::type_index addition = typeid(void);
} example;

// A dense tensor on the CPU, of single or double precision, without a tangent.
bool plain(const Tensor& x) {
  return x.key_set() == example.keys && !x._fw_grad(0).defined() &&
      (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
}

bool alike(const Tensor& x, const Tensor& y) {
  return x.scalar_type() == y.scalar_type() && x.sizes() == y.sizes() && x.strides() == y.strides();
}

bool dense(const Tensor& x) { return x.is_non_overlapping_and_dense(); }

// Neither transforms nor modes.
bool ordinary_times() {
  auto local = c10::impl::tls_local_dispatch_key_set();
  return local.included_ == c10::default_included_set && local.excluded_ == c10::default_excluded_set;
}

// An empty tensor of the same form, without a detour.
TensorBase like(const Tensor& x) { return at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type()); }

struct StepBackward : Node {
  SavedVariable x, z, tau;
  double t = 0;                  // tau in the forward pass
  Tensor copy;                   // of z, until it was seen that nobody changes z; or undefined
  c10::VariableVersion version;  // of z, as it goes on
  uint32_t at_first = 0;
  Tensor seen;                   // one Seen, of the block
  bool by_sum = false;           // whether y = x + r

  std::string name() const override { return "StepBackward"; }

  // Gradients of x, of y (or of r, where y = x + r), of tau.
  variable_list apply(variable_list&& gradients) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& g = gradients[0];
    if (!g.defined()) return variable_list(3);
    bool unchanged = version.current_version() == at_first, differentiable = at::GradMode::is_enabled();
    uint8_t& flag = *seen.mutable_data_ptr<uint8_t>();
    if (flag != CHANGED) flag = unchanged ? LEFT : CHANGED;
    if (!unchanged && !copy.defined()) {
      throw std::runtime_error(
          "the output of a wrapped block was changed in place before its gradient was computed, and earlier ones were "
          "not: repeat this step (from now on outputs are copied), or wrap with compile='never'");
    }
    Tensor from = x.unpack(), step = tau.unpack(), to = result(differentiable);
    bool needed = !by_sum && task_should_compute_output(0);
    if (differentiable || !ordinary_times() || !plain(g) || g.scalar_type() != to.scalar_type() || !dense(g)) {
      Tensor by = differentiable ? step : at::scalar_tensor(t, step.options());
      Tensor dtau = at::div(at::sum(at::mul(g, at::sub(to, from))), by);
      return {by_sum ? g : needed ? at::mul(g, at::rsub(step, 1)) : Tensor(), at::mul(g, step), dtau};
    }
    bool single = g.scalar_type() == at::kFloat;
    double now = single ? *step.const_data_ptr<float>() : *step.const_data_ptr<double>();
    TensorBase dy = like(g), dx = needed ? like(g) : TensorBase(), dtau = like(step);
    auto pass = single ? differentiate<float> : differentiate<double>;
    double sum;
    if (g.strides() == to.strides()) {
      sum = pass(g, to, from, now, dy, dx) / t;
    } else {  // each in its own layout
      pass(g, g, g, now, dy, dx);
      sum = pass(Tensor(like(to)).copy_(g), to, from, now, {}, {}) / t;
    }
    single ? void(*dtau.mutable_data_ptr<float>() = sum) : void(*dtau.mutable_data_ptr<double>() = sum);
    return {by_sum ? g : Tensor(dx), Tensor(dy), Tensor(dtau)};
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    z.reset_data();
    tau.reset_data();
    copy.reset();
  }

  // Of torch's compiled backward passes, where it has them.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const {
    throw std::runtime_error("compiled autograd does not know the steps of wrapped blocks: wrap with compile='never'");
  }

 private:
  // z; to be differentiated again, it is the output of this node.
  Tensor result(bool differentiable) {
    if (!copy.defined()) return z.unpack(getptr());
    if (!differentiable) return copy;
    Tensor again = copy.detach();
    torch::autograd::impl::set_gradient_edge(again, {getptr(), 0});
    return again;
  }
};

// Nodes were shared pointers in older versions of torch.
template <typename T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>) {
    return c10::make_intrusive<T>();
  } else {
    return std::make_shared<T>();
  }
}

// Whether someone is told when a node is run.
bool watched(Node& node) {
  return !node.pre_hooks().empty() || !node.post_hooks().empty() || !node.tensor_pre_hooks().empty() ||
      !node.retains_grad_hooks().empty();
}

// Which input of the node of y is x, where y = x + r without a factor and only y knows it; else -1. A factor shows in
// what the node makes of a gradient.
int of_sum(Node& node, const Edge& to_x, const Tensor& x) {
  if (!to_x.is_valid() || example.addition != typeid(node)) return -1;
  int i = node.next_edge(0) == to_x ? 0 : 1;
  if (node.next_edge(i) != to_x) return -1;
  static const Tensor& single = *new Tensor(at::scalar_tensor(1, at::kFloat));
  static const Tensor& exact = *new Tensor(at::scalar_tensor(1, at::kDouble));
  const Tensor& gradient = x.scalar_type() == at::kFloat ? single : exact;
  at::AutoGradMode off(false);
  auto both = node({gradient});
  bool alone = both[i].is_same(gradient) && (!node.next_edge(1 - i).is_valid() || both[1 - i].is_same(gradient));
  return alone ? i : -1;
}

bool step(const Tensor& x, const Tensor& y, const Tensor& tau, const Tensor& seen) {
  if (!at::GradMode::is_enabled() || !ordinary_times() || at::SavedTensorDefaultHooks::get_hooks()) return false;
  if (!plain(x) || !plain(y) || !plain(tau) || !alike(x, y) || !dense(x)) return false;
  if (tau.dim() != 0 || !tau.requires_grad() || tau.scalar_type() != x.scalar_type()) return false;
  if (seen.key_set() != example.keys || y.is_view()) return false;
  if (y.storage().data_ptr().get_deleter() != c10::GetCPUAllocator()->raw_deleter()) return false;  // memory of others
  if (!y.grad_fn() || watched(*y.grad_fn())) return false;
  bool single = x.scalar_type() == at::kFloat;
  double t = single ? *tau.const_data_ptr<float>() : *tau.const_data_ptr<double>();
  if (!(std::abs(t) >= SMALLEST)) return false;

  auto node = make_node<StepBackward>();
  bool known_elsewhere = y.grad_fn().use_count() != example.node;
  auto before = y.grad_fn();
  Edge to_x = torch::autograd::impl::gradient_edge(x), to_y = {before, static_cast<uint32_t>(y.output_nr())};
  int sum = known_elsewhere ? -1 : of_sum(*before, to_x, x);
  node->by_sum = sum >= 0;
  node->set_next_edges({to_x, sum < 0 ? to_y : before->next_edge(1 - sum), torch::autograd::impl::gradient_edge(tau)});
  node->seen = seen;
  node->t = t;
  node->x = SavedVariable(x, false);
  node->tau = SavedVariable(tau, false);
  (single ? blend<float> : blend<double>)(x, y, t);
  torch::autograd::impl::bump_version(y);
  auto number = node->add_input_metadata(y);
  torch::autograd::impl::set_gradient_edge(y, {node, number});
  node->z = SavedVariable(y, true);
  node->version = torch::autograd::impl::version_counter(y);
  node->at_first = node->version.current_version();
  if (*seen.const_data_ptr<uint8_t>() != LEFT) {
    at::AutoDispatchBelowADInplaceOrView guard;
    node->copy = y.clone();
  }
  return true;
}

// The tensor in a Python object of the very type torch.Tensor, while no mode looks on. The headers that know how Python
// holds one take longer to compile than all others together; `_cdata` is its address.
Tensor tensor_of(PyObject* object) {
  static PyObject* name = PyUnicode_InternFromString("_cdata");
  PyObject* number = PyObject_GetAttr(object, name);
  if (!number) return Tensor();
  auto* address = static_cast<c10::TensorImpl*>(PyLong_AsVoidPtr(number));
  Py_DECREF(number);
  using Pointer = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  return address ? Tensor(Pointer::unsafe_reclaim_from_nonowning(address)) : Tensor();
}

struct WithoutPython {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutPython() { PyEval_RestoreThread(state); }
};

// step(x, y, tau, seen): whether y now is x + tau (y - x). It is called from one place in Python alone, for the first
// time with an example y = x + x.
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t) {
  if (!example.type) example.type = Py_TYPE(arguments[1]);
  if (at::impl::torch_function_mode_enabled()) Py_RETURN_FALSE;
  for (int i : {0, 1, 2, 3}) {
    if (Py_TYPE(arguments[i]) != example.type) Py_RETURN_FALSE;
  }
  try {
    Tensor x = tensor_of(arguments[0]), y = tensor_of(arguments[1]), tau = tensor_of(arguments[2]);
    Tensor seen = tensor_of(arguments[3]);
    if (PyErr_Occurred()) return nullptr;
    Py_ssize_t python = Py_REFCNT(arguments[1]);
    if (example.python == 0) {
      auto& node = y.grad_fn();
      example = {example.type, python, y.use_count(), size_t(node.use_count()), y.key_set(), typeid(*node)};
      Py_RETURN_FALSE;
    }
    if (python != example.python || y.use_count() != example.native || y.storage().use_count() != 1) Py_RETURN_FALSE;
    bool done;
    {
      WithoutPython unlocked;
      done = step(x, y, tau, seen);
    }
    if (done) Py_RETURN_TRUE;
    Py_RETURN_FALSE;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL, nullptr}, {nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "taulearn_step", nullptr, -1, methods};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_taulearn_step() { return PyModule_Create(&module); }
