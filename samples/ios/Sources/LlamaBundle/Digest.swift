import Foundation

#if canImport(CryptoKit)
import CryptoKit
#endif

/// SHA-256 of what is added bit by bit: CryptoKit's where there is one, ours elsewhere.
struct Digest {
    #if canImport(CryptoKit)
    private var hash = CryptoKit.SHA256()

    mutating func add(_ bytes: UnsafeRawBufferPointer) { hash.update(bufferPointer: bytes) }

    func hexadecimal() -> String { Self.text(Array(hash.finalize())) }
    #else
    private var hash = PortableSHA256()

    mutating func add(_ bytes: UnsafeRawBufferPointer) { hash.add(bytes) }

    func hexadecimal() -> String { Self.text(hash.finished()) }
    #endif

    static func of(_ data: Data) -> String {
        var digest = Digest()
        data.withUnsafeBytes { digest.add($0) }
        return digest.hexadecimal()
    }

    /// Of a file of any size, a mebibyte at a time.
    static func of(contentsOf url: URL) throws -> String {
        guard let stream = InputStream(url: url) else { throw unreadable(url) }
        stream.open()
        defer { stream.close() }
        var digest = Digest()
        var buffer = [UInt8](repeating: 0, count: 1 << 20)
        while true {
            let count = stream.read(&buffer, maxLength: buffer.count)
            guard count >= 0 else { throw unreadable(url) }
            if count == 0 { return digest.hexadecimal() }
            buffer.withUnsafeBytes { digest.add(UnsafeRawBufferPointer(rebasing: $0[..<count])) }
        }
    }

    static func text(_ bytes: [UInt8]) -> String {
        bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
    }

    private static func unreadable(_ url: URL) -> BundleError {
        BundleError("\(url.path) cannot be read", hint: copyAgain)
    }
}
