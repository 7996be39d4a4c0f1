// Run an AOTInductor package on float32 of a given shape, without Python:
//
//     runner model.pt2 input.bin output.bin 1 300 32

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int count, char** arguments) {
    c10::InferenceMode inference;
    std::vector<int64_t> shape;
    for (int i = 4; i < count; i++) shape.push_back(std::stoll(arguments[i]));
    torch::Tensor input = torch::empty(shape);
    std::ifstream(arguments[2], std::ios::binary).read(static_cast<char*>(input.data_ptr()), input.nbytes());
    torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
    torch::Tensor output = loader.run({input})[0].contiguous();
    std::ofstream(arguments[3], std::ios::binary).write(static_cast<const char*>(output.data_ptr()), output.nbytes());
    std::cout << output.sizes() << std::endl;
}
