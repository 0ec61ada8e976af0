// Classify images by a packaged model, without Python: what ocs.export(model, "model.pt2", images) wrote.
//
//     serve model.pt2 images.f32 N C H W
//
// images.f32 holds N x C x H x W floats, as the model takes them. Prints the class of each image, one a line. make.py
// beside this file writes both for the bundled ResNet-20 and builds the program.

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

static torch::Tensor read_images(const char *path, const std::vector<int64_t> &shape)
{
    torch::Tensor images = torch::empty(shape);
    std::ifstream file(path, std::ios::binary);
    if (!file.read(static_cast<char *>(images.data_ptr()), images.nbytes()))
        throw std::runtime_error(std::string(path) + " does not hold images of this shape");
    return images.contiguous(torch::MemoryFormat::ChannelsLast);
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        std::cerr << "usage: serve model.pt2 images.f32 N C H W\n";
        return 2;
    }
    try {
        std::vector<int64_t> shape;
        for (int i = 3; i < argc; i++)
            shape.push_back(std::atoll(argv[i]));
        c10::InferenceMode inference;
        torch::inductor::AOTIModelPackageLoader model(argv[1]);
        const torch::Tensor scores = model.run({read_images(argv[2], shape)}).at(0);
        const torch::Tensor classes = scores.argmax(1);
        for (int64_t i = 0; i < classes.numel(); i++)
            std::cout << classes[i].item<int64_t>() << "\n";
    } catch (const std::exception &error) {
        std::cerr << "serve: " << error.what() << "\n";
        return 1;
    }
    return 0;
}
