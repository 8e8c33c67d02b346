import Foundation

/// The folder that an export makes, whole: every file that its manifest lists is there, with its size and SHA-256.
public struct ModelBundle: Sendable {
    /// How much of a bundle is looked at when it is opened.
    public enum Check: Sendable {
        /// Every byte: once, after the bundle was copied or downloaded.
        case checksums
        /// That every file is there and as long as listed: at each later start.
        case sizes
    }

    public let folder: URL
    public let manifest: Manifest
    /// Of `manifest.json` itself, which a device report names.
    public let manifestSHA256: String

    /// Throws `BundleError`, which names the first file that is not as listed.
    public init(folder: URL, check: Check = .checksums) throws {
        let url = folder.appendingPathComponent("manifest.json")
        guard FileManager.default.fileExists(atPath: url.path) else {
            throw BundleError("\(folder.path) has no manifest.json", hint: "name the folder that an export has written")
        }
        let data = try read(url)
        self.folder = folder
        manifest = try Manifest.decode(data, from: url)
        manifestSHA256 = Digest.of(data)
        for file in manifest.files { try Self.check(file, in: folder, check) }
    }

    public func url(_ path: String) -> URL { folder.appendingPathComponent(path) }

    public func has(_ path: String) -> Bool { manifest.files.contains { $0.path == path } }

    /// The file, or for Core ML the package, that the runtime loads.
    public var artifact: URL {
        switch manifest.target {
        case .executorch: url("model.pte")
        case .onnxruntime: url("model.onnx")
        case .coreml: url("model.mlpackage")
        }
    }

    /// The chat template as text around messages, or nil where it cannot be told so.
    public func chatFormat() throws -> ChatFormat? {
        has("chat_format.json") ? try decode(ChatFormat.self, from: url("chat_format.json")) : nil
    }

    public func goldens() throws -> Goldens { try Goldens(bundle: self) }

    /// Sampling as the checkpoint's authors advise it; greedy where they say nothing.
    public func sampling() throws -> Sampling {
        has("generation_config.json")
            ? try decode(Sampling.self, from: url("generation_config.json")) : Sampling.greedy
    }

    private static func check(_ file: Manifest.File, in folder: URL, _ check: Check) throws {
        let url = folder.appendingPathComponent(file.path)
        let attributes = try? FileManager.default.attributesOfItem(atPath: url.path)
        guard let size = (attributes?[.size] as? NSNumber)?.intValue else {
            throw BundleError("\(folder.path) lacks \(file.path), which its manifest lists", hint: copyAgain)
        }
        guard size == file.bytes else {
            throw BundleError("\(file.path) has \(size) bytes, its manifest says \(file.bytes)", hint: copyAgain)
        }
        guard check == .checksums else { return }
        let found = try Digest.of(contentsOf: url)
        guard found == file.sha256 else {
            throw BundleError("\(file.path) has SHA-256 \(found), its manifest says \(file.sha256)", hint: copyAgain)
        }
    }
}
