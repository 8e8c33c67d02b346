#if canImport(ExecuTorch)
import ExecuTorch
import Foundation
import LlamaBundle

/// A `.pte` of ours: `forward(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, T or 1, V]`.
///
/// The cache is inside the program and written at the positions that a call names, so rewinding is a matter of the
/// position alone. `Module` is not to be used from two threads at once: keep it inside one actor.
struct ExecuTorchRunner: Runner {
    private let manifest: Manifest
    private let module: Module
    private var position = 0

    init(bundle: ModelBundle) throws {
        manifest = bundle.manifest
        module = Module(filePath: bundle.artifact.path, loadMode: .mmap)
        try module.load("forward")
    }

    mutating func rewind(to position: Int) throws {
        try checkRewind(position, current: self.position)
        self.position = position
    }

    mutating func feed(_ ids: [Int]) throws -> [Float] {
        try checkFeed(ids, position: position, manifest: manifest)
        let tokens = Tensor<Int64>(ids.map(Int64.init), shape: [1, ids.count])
        let start = Tensor<Int64>([Int64(position)], shape: [1])
        let rows = try autoreleasepool { try Tensor<Float>(module.forward(tokens, start)).scalars() }
        guard rows.count >= manifest.model.vocabularySize else {
            throw BundleError(
                "the program gives \(rows.count) logits, \(manifest.model.vocabularySize) were expected",
                hint: "export the bundle again with --target executorch")
        }
        position += ids.count
        return Array(rows.suffix(manifest.model.vocabularySize))
    }
}
#endif
