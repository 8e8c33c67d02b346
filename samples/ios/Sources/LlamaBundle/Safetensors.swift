import Foundation

/// A safetensors file, mapped into memory: 8 bytes of header length, a header in JSON, then the tensors.
struct Safetensors {
    private struct Entry: Decodable {
        let dtype: String
        let shape: [Int]
        let offsets: [Int]

        enum CodingKeys: String, CodingKey {
            case dtype, shape
            case offsets = "data_offsets"
        }
    }

    private let url: URL
    private let data: Data
    private let start: Int
    private let entries: [String: Entry]

    /// Throws `BundleError` where the file is missing, or is none.
    init(contentsOf url: URL) throws {
        self.url = url
        data = try read(url)
        guard data.count >= 8 else { throw Safetensors.broken(url, "has \(data.count) bytes, 8 or more were expected") }
        let length = data.withUnsafeBytes { UInt64(littleEndian: $0.loadUnaligned(as: UInt64.self)) }
        guard length <= UInt64(data.count - 8) else {
            throw Safetensors.broken(url, "has \(data.count) bytes, its header alone would be \(length)")
        }
        start = 8 + Int(length)
        do {
            let header = try JSONSerialization.jsonObject(with: data.subdata(in: 8..<start)) as? [String: Any] ?? [:]
            let tensors = header.filter { $0.key != "__metadata__" }
            let written = try JSONSerialization.data(withJSONObject: tensors)
            entries = try JSONDecoder().decode([String: Entry].self, from: written)
        } catch {
            throw Safetensors.broken(url, "has a header that is not as the format wants it: \(error)")
        }
    }

    var names: [String] { entries.keys.sorted() }

    func shape(_ name: String) throws -> [Int] { try entry(name).shape }

    /// Of a tensor of int32 or int64, row after row.
    func integers(_ name: String) throws -> [Int] {
        switch try entry(name).dtype {
        case "I64": try numbers(name, as: Int64.self).map { Int(Int64(littleEndian: $0)) }
        case "I32": try numbers(name, as: Int32.self).map { Int(Int32(littleEndian: $0)) }
        case let found: throw Safetensors.broken(url, "has \(name) as \(found), I32 or I64 was expected")
        }
    }

    /// Of a tensor of float32, row after row.
    func floats(_ name: String) throws -> [Float] {
        let found = try entry(name).dtype
        guard found == "F32" else { throw Safetensors.broken(url, "has \(name) as \(found), F32 was expected") }
        return try numbers(name, as: UInt32.self).map { Float(bitPattern: UInt32(littleEndian: $0)) }
    }

    private func entry(_ name: String) throws -> Entry {
        guard let entry = entries[name] else {
            throw Safetensors.broken(url, "has no tensor \(name), only \(names.joined(separator: ", "))")
        }
        return entry
    }

    private func numbers<T>(_ name: String, as type: T.Type) throws -> [T] {
        let entry = try entry(name)
        let size = MemoryLayout<T>.size
        let room = data.count - start
        let bytes = entry.shape.reduce(size) { product, dimension in
            let (result, overflow) = product.multipliedReportingOverflow(by: max(dimension, 0))
            return overflow ? Int.max : result
        }
        guard entry.offsets.count == 2, (0...room).contains(entry.offsets[0]), (0...room).contains(entry.offsets[1]),
            entry.offsets[1] - entry.offsets[0] == bytes
        else {
            throw Safetensors.broken(
                url, "has \(name) of shape \(entry.shape) at \(entry.offsets), with \(room) bytes of tensors in all")
        }
        return data.withUnsafeBytes { memory in
            let base = start + entry.offsets[0]
            return (0..<bytes / size).map { memory.loadUnaligned(fromByteOffset: base + size * $0, as: type) }
        }
    }

    private static func broken(_ url: URL, _ what: String) -> BundleError {
        BundleError("\(url.path) \(what)", hint: copyAgain)
    }
}
