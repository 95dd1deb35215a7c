// swift-tools-version:5.9
import PackageDescription

// `dist/ios` is the package that `cargo xtask build-ios` writes.
let package = Package(
    name: "EdgeLLMChat",
    platforms: [.iOS(.v16)],
    products: [.library(name: "EdgeLLMChat", targets: ["EdgeLLMChat"])],
    dependencies: [.package(name: "EdgeLLM", path: "../../../../dist/ios")],
    targets: [.target(name: "EdgeLLMChat", dependencies: [.product(name: "EdgeLLM", package: "EdgeLLM")])]
)
