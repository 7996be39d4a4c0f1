// Parse an ONNX file and build a TensorRT engine from it, without a GPU: what `trtexec --onnx --saveEngine` does first.
//
//   build_engine MODEL PROFILE ENGINE
//
// PROFILE: lines "name min opt max", each a shape as 1x64. Built against the headers of TensorRT and linked with
// TensorRT-RTX, which needs no GPU to build. Prints one line; exits 1 where parsing fails, 2 where building does.
#include <cstdint>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>

#include "NvInfer.h"
#include "NvOnnxParser.h"

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kERROR) std::cerr << message << "\n";
    }
};

static nvinfer1::Dims shape(std::string const& text) {
    nvinfer1::Dims dims{};
    std::stringstream sizes(text);
    for (std::string size; std::getline(sizes, size, 'x');) dims.d[dims.nbDims++] = std::stoll(size);
    return dims;
}

int main(int, char** argv) {
    Logger logger;
    auto* builder = static_cast<nvinfer1::IBuilder*>(createInferBuilder_INTERNAL(&logger, LIBRARY_VERSION));
    if (!builder) return 3;
    auto* network = builder->createNetworkV2(0);
    auto* parser = static_cast<nvonnxparser::IParser*>(createNvOnnxParser_INTERNAL(network, &logger, NV_ONNX_PARSER_VERSION));
    if (!parser || !parser->parseFromFile(argv[1], 1)) {
        for (int i = 0; parser && i < parser->getNbErrors(); ++i) std::cerr << parser->getError(i)->desc() << "\n";
        return 1;
    }
    auto* config = builder->createBuilderConfig();
    config->clearFlag(nvinfer1::BuilderFlag::kTF32);  // what engines compute is compared with float32
    auto* profile = builder->createOptimizationProfile();
    std::ifstream lines(argv[2]);
    for (std::string name, least, usual, most; lines >> name >> least >> usual >> most;) {
        profile->setDimensions(name.c_str(), nvinfer1::OptProfileSelector::kMIN, shape(least));
        profile->setDimensions(name.c_str(), nvinfer1::OptProfileSelector::kOPT, shape(usual));
        profile->setDimensions(name.c_str(), nvinfer1::OptProfileSelector::kMAX, shape(most));
    }
    config->addOptimizationProfile(profile);
    auto* engine = builder->buildSerializedNetwork(*network, *config);
    if (!engine) return 2;
    std::ofstream(argv[3], std::ios::binary).write(static_cast<char const*>(engine->data()), engine->size());
    std::cout << "built " << engine->size() << " bytes\n";
    return 0;
}
