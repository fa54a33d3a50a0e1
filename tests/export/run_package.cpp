// Runs an AOTInductor package without Python: libtrine is opened first, for it holds the operators.
//
//   run_package LIBTRINE PACKAGE ROWS COLUMNS < x (float32) > y (float32)

#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int, char** arguments) {
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  if (dlsym(RTLD_DEFAULT, "Py_IsInitialized") != nullptr) {
    std::fprintf(stderr, "something brought Python along\n");
    return 2;
  }
  const int64_t rows = std::atoll(arguments[3]), columns = std::atoll(arguments[4]);
  std::vector<float> x(rows * columns);
  if (std::fread(x.data(), sizeof(float), x.size(), stdin) != x.size()) return 3;

  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const at::Tensor y = model.run({at::from_blob(x.data(), {rows, columns})})[0].contiguous();
  std::fwrite(y.const_data_ptr(), sizeof(float), y.numel(), stdout);
  return 0;
}
