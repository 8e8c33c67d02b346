import CoreML
import Foundation
import LlamaBundle

/// A `.mlpackage` of ours: inputs `inputIds` int32 [1, T] and `causalMask` float16 [1, 1, T, E], states `keyCache` and
/// `valueCache`, output `logits` [1, T or 1, V].
///
/// E counts the positions in the cache after the call; from it and T the program knows where the new tokens stand. What
/// lies in the cache beyond the current position is never looked at, so rewinding is a matter of the position alone.
struct CoreMLRunner: Runner {
    private let manifest: Manifest
    private let model: MLModel
    private let state: MLState
    private var position = 0

    /// Compiles the package on first use and keeps the result in `compiled`, which may be removed at any time.
    ///
    /// The packages are made for CPU and GPU: reports on stateful models with open lengths on the Neural Engine
    /// contradict each other, so measure before you choose another unit.
    init(bundle: ModelBundle, compiled: URL, units: MLComputeUnits = .cpuAndGPU) async throws {
        manifest = bundle.manifest
        if !FileManager.default.fileExists(atPath: compiled.path) {
            let temporary = try await MLModel.compileModel(at: bundle.artifact)
            try FileManager.default.moveItem(at: temporary, to: compiled)
        }
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        state = model.makeState()
    }

    mutating func rewind(to position: Int) throws {
        try checkRewind(position, current: self.position)
        self.position = position
    }

    mutating func feed(_ ids: [Int]) throws -> [Float] {
        try checkFeed(ids, position: position, manifest: manifest)
        let end = position + ids.count
        let tokens = MLShapedArray<Int32>(scalars: ids.map(Int32.init), shape: [1, ids.count])
        let mask = MLShapedArray<Float16>(
            scalars: causalMask(position: position, end: end).map(Float16.init(bitPattern:)),
            shape: [1, 1, ids.count, end])
        // A whole answer is one job of an actor: without a pool of their own, the outputs of all its tokens pile up.
        let logits = try autoreleasepool {
            let inputs = try MLDictionaryFeatureProvider(dictionary: [
                "inputIds": MLFeatureValue(multiArray: MLMultiArray(tokens)),
                "causalMask": MLFeatureValue(multiArray: MLMultiArray(mask)),
            ])
            let outputs = try model.prediction(from: inputs, using: state)
            return try lastRow(of: outputs.featureValue(for: "logits")?.multiArrayValue)
        }
        position = end
        return logits
    }

    private func lastRow(of logits: MLMultiArray?) throws -> [Float] {
        let rows: [Float]
        switch logits?.dataType {
        case .float16: rows = MLShapedArray<Float16>(logits!).scalars.map(Float.init)
        case .float32: rows = MLShapedArray<Float>(logits!).scalars
        default: rows = []
        }
        let wanted = manifest.model.vocabularySize
        guard rows.count >= wanted else {
            throw BundleError(
                "the model's output 'logits' holds \(rows.count) floats, \(wanted) were expected",
                hint: "export the bundle again with --target coreml")
        }
        return Array(rows.suffix(wanted))
    }
}
