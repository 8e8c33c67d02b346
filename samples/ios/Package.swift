// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "LlamaBundle",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [
        .library(name: "LlamaBundle", targets: ["LlamaBundle"]),
        .executable(name: "SelfTestOverPipe", targets: ["SelfTestOverPipe"]),
    ],
    targets: [
        .target(name: "LlamaBundle"),
        .executableTarget(name: "SelfTestOverPipe", dependencies: ["LlamaBundle"]),
        .testTarget(name: "LlamaBundleTests", dependencies: ["LlamaBundle"]),
    ]
)
