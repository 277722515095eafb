// Products of matrices as small as the layers of a narrow network: C = A B in float32, of operands that fit into the
// second-level cache.
//
// The rows of C are shared among the threads, without a word between them. Each thread goes through its rows in strips
// of a few vectors' width, and through a strip in tiles that stay in registers:
//
//     tile: a few rows of C by a few vectors, summed over k in order; A enters by single elements, B by vectors.
//     dots: a few rows by a few columns, each a sum of vectors along k; for a transposed B and a long k.
//
// A transposed B is otherwise turned strip by strip into a buffer of the thread. Every element of C is summed in an
// order that depends on the shapes alone: the result is the same on any number of threads.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();

// Sums, operands and the current factor of a tile must fit into the registers: 16 with AVX2, 32 elsewhere.
#if defined(CPU_CAPABILITY_AVX2)
constexpr int WIDEST = 2, SIDE = 3;
constexpr int rows_of(int) { return 6; }
#else
constexpr int WIDEST = 4, SIDE = 5;
constexpr int rows_of(int vectors) { return vectors == 4 ? 6 : 8; }
#endif
constexpr int64_t WORTH_A_THREAD = 30'000;  // multiplications: about the time in which a thread wakes
constexpr int64_t LONG = 4;                 // k over rows from which dots cost less than turning B

struct Matrix {
  const float* data;
  int64_t row, column;  // strides

  Matrix from_row(int64_t i) const { return {data + i * row, row, column}; }
  Matrix from_column(int64_t j) const { return {data + j * column, row, column}; }
};

#define UNROLLED _Pragma("GCC unroll 8") for
#define INLINE inline __attribute__((always_inline))

// C (M, N vectors) = A (M, K) B (K, N vectors); of the last vector only `last` elements count where it is ragged.
template <int M, int N, bool ragged>
INLINE void tile(int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t last) {
  Vec sums[M][N], right[N];
  UNROLLED(int i = 0; i < M; i++) UNROLLED(int j = 0; j < N; j++) sums[i][j] = Vec(0.f);
  for (int64_t k = 0; k < K; k++, b += b_row) {
    UNROLLED(int j = 0; j < N; j++) {
      right[j] = ragged && j == N - 1 ? Vec::loadu(b + j * LANES, last) : Vec::loadu(b + j * LANES);
    }
    UNROLLED(int i = 0; i < M; i++) {
      Vec left(a.data[i * a.row + k * a.column]);
      UNROLLED(int j = 0; j < N; j++) sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
    }
  }
  UNROLLED(int i = 0; i < M; i++) UNROLLED(int j = 0; j < N; j++) {
    float* to = c + i * c_row + j * LANES;
    ragged && j == N - 1 ? sums[i][j].store(to, last) : sums[i][j].store(to);
  }
}

// C (M, N) = A (M, K) B^T, of rows of A and columns of B that are contiguous.
template <int M, int N>
INLINE void dots(int64_t K, Matrix a, Matrix b, float* c, int64_t c_row) {
  Vec sums[M][N], right[N];
  UNROLLED(int i = 0; i < M; i++) UNROLLED(int j = 0; j < N; j++) sums[i][j] = Vec(0.f);
  auto add = [&](int64_t k, auto load) __attribute__((always_inline)) {
    UNROLLED(int j = 0; j < N; j++) right[j] = load(b.data + j * b.column + k);
    UNROLLED(int i = 0; i < M; i++) {
      Vec left = load(a.data + i * a.row + k);
      UNROLLED(int j = 0; j < N; j++) sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) add(k, [](const float* x) { return Vec::loadu(x); });
  if (k < K) add(k, [=](const float* x) { return Vec::loadu(x, K - k); });
  UNROLLED(int i = 0; i < M; i++) UNROLLED(int j = 0; j < N; j++) {
    c[i * c_row + j] = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sums[i][j]);
  }
}

// Splits `size` into equal parts of at most `most` and calls work(start, number) for each, the number being a constant.
template <int most, typename Work>
INLINE void in_parts(int64_t size, Work work) {
  int64_t parts = (size + most - 1) / most;
  for (int64_t part = 0; part < parts; part++) {
    int64_t start = part * size / parts, number = (part + 1) * size / parts - start;
#define PART(n) \
  if constexpr (n <= most) \
    if (number == n) work(start, std::integral_constant<int, n>());
    PART(1) PART(2) PART(3) PART(4) PART(5) PART(6) PART(7) PART(8)
#undef PART
  }
}

template <int N, bool ragged>
void strip_of(int64_t M, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t last) {
  in_parts<rows_of(N)>(M, [=](int64_t i, auto rows) {
    tile<decltype(rows)::value, N, ragged>(K, a.from_row(i), b, b_row, c + i * c_row, c_row, last);
  });
}

void by_dots(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t c_row) {
  in_parts<SIDE>(M, [&](int64_t i, auto rows) {
    in_parts<SIDE>(N, [&](int64_t j, auto columns) {
      dots<decltype(rows)::value, decltype(columns)::value>(K, a.from_row(i), b.from_column(j), c + i * c_row + j, c_row);
    });
  });
}

// to (K, width) = the transpose of the N <= width contiguous columns of b.
void turn(int64_t K, int64_t N, Matrix b, float* to, int64_t width) {
  for (int64_t k = 0; k < K; k += LANES) {
    for (int64_t j = 0; j < N; j += LANES) {
      const float* from = b.data + j * b.column + k;
      int rows = std::min(LANES, N - j), columns = std::min(LANES, K - k);
      if (rows == LANES && columns == LANES) {
        at::vec::transpose_mxn<float, LANES, LANES>(from, b.column, to + k * width + j, width);
      } else {
        at::vec::transpose_mxn<float>(from, b.column, to + k * width + j, width, rows, columns);
      }
    }
  }
}

void by_tiles(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t c_row) {
  static thread_local std::vector<float> turned;
  in_parts<WIDEST>((N + LANES - 1) / LANES, [&](int64_t first, auto vectors) {
    int64_t j = first * LANES, width = vectors * LANES, columns = std::min(N - j, width);
    int64_t last = columns - (vectors - 1) * LANES;
    Matrix strip = b.from_column(j);
    if (b.column != 1) {
      if (turned.size() < size_t(K * width)) turned.resize(K * width);
      turn(K, columns, strip, turned.data(), width);
      strip = {turned.data(), width, 1};
    }
    auto tiles = last < LANES ? strip_of<decltype(vectors)::value, true> : strip_of<decltype(vectors)::value, false>;
    tiles(M, K, a, strip.data, strip.row, c + j, c_row, last);
  });
}

void product(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t c_row) {
  auto rows = b.column != 1 && a.column == 1 && K >= LONG * M ? by_dots : by_tiles;
  int64_t useful = omp_in_parallel() ? 1 : std::min(M, M * N * K / WORTH_A_THREAD);
  int threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), useful));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t of = omp_get_num_threads(), i = omp_get_thread_num() * M / of, end = (omp_get_thread_num() + 1) * M / of;
    rows(end - i, N, K, a.from_row(i), b, c + i * c_row, c_row);
  }
}

bool view(AtenTensorHandle tensor, int64_t** sizes, Matrix& matrix) {
  void* data;
  int64_t* strides;
  if (aoti_torch_get_data_ptr(tensor, &data) || aoti_torch_get_sizes(tensor, sizes) ||
      aoti_torch_get_strides(tensor, &strides)) {
    return false;
  }
  matrix = {static_cast<const float*>(data), strides[0], strides[1]};
  return true;
}

}  // namespace

// What compiled code calls for torch.ops.taulearn.small_product(a, b), matrices of float32. Where b turns out to be stored
// neither by rows nor by columns (expanded from one number, say) the product is torch's.
extern "C" __attribute__((visibility("default"))) AOTITorchError aoti_torch_cpu_small_product(
    AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle* result) {
  Matrix left, right;
  int64_t *left_sizes, *right_sizes;
  if (!view(a, &left_sizes, left) || !view(b, &right_sizes, right)) return AOTI_TORCH_FAILURE;
  int64_t sizes[] = {left_sizes[0], right_sizes[1]}, strides[] = {right_sizes[1], 1};
  void* data;
  if (aoti_torch_empty_strided(
          2, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, result) ||
      aoti_torch_get_data_ptr(*result, &data)) {
    return AOTI_TORCH_FAILURE;
  }
  if (right.row != 1 && right.column != 1) return aoti_torch_cpu_mm_out(*result, a, b);
  product(sizes[0], sizes[1], left_sizes[1], left, right, static_cast<float*>(data), sizes[1]);
  return AOTI_TORCH_SUCCESS;
}
