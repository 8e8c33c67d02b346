// What ExecuTorchRunner.swift calls, declared after ExecuTorch's guide for iOS, so that check-app.sh can check types
// without its binaries. No part of the app.
@_exported import CoreML

public enum ModuleLoadMode { case file, mmap }
public protocol Scalar {}
extension Int64: Scalar {}
extension Float: Scalar {}
public class Value {}
public protocol ValueConvertible {}
public protocol ValueSequenceConstructible { init(_: [Value]) throws }

public final class Tensor<T: Scalar>: ValueConvertible, ValueSequenceConstructible {
    public init(_: [T], shape: [Int]) {}
    public init(_: [Value]) throws {}
    public func scalars() -> [T] { fatalError() }
}

public class Module {
    public init(filePath: String, loadMode: ModuleLoadMode) {}
    public func load(_: String) throws {}
    public func forward(_: ValueConvertible...) throws -> [Value] { fatalError() }
    public func forward<Output: ValueSequenceConstructible>(_: ValueConvertible...) throws -> Output { fatalError() }
}
