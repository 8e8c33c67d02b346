import Foundation
import LlamaBundle

/// What executes a bundle on this device, as a device report names it.
func runtimeName(of bundle: ModelBundle) -> String {
    switch bundle.manifest.target {
    case .coreml: "Core ML, CPU and GPU"
    case .executorch: "executorch, xnnpack"
    case .onnxruntime: "onnxruntime"
    }
}

/// The runner for a bundle. What it has to keep between starts goes into `scratch`.
func loadRunner(for bundle: ModelBundle, scratch: URL) async throws -> any Runner {
    switch bundle.manifest.target {
    case .coreml:
        let compiled = scratch.appendingPathComponent("\(bundle.manifestSHA256).mlmodelc")
        return try await CoreMLRunner(bundle: bundle, compiled: compiled)
    case .executorch:
        #if canImport(ExecuTorch)
        return try ExecuTorchRunner(bundle: bundle)
        #else
        throw BundleError(
            "this app was built without ExecuTorch, which the bundle is for", hint: "add its packages to project.yml")
        #endif
    case .onnxruntime:
        throw BundleError(
            "the bundle is for onnxruntime, coreml or executorch was expected",
            hint: "export with --target coreml or executorch, or write a Runner over onnxruntime's package for Swift")
    }
}
