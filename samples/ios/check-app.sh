#!/bin/sh
# Checks the app as far as a system without Apple's SDK can: everything but the views against stubs, the views' grammar.
set -eu
cd "$(dirname "$0")"
swift() { ./swift-toolchain.sh run "$@"; }
built=.build/app

./swift-toolchain.sh
mkdir -p "$built"
module() {
    name=$1
    shift
    swift swiftc -parse-as-library -emit-module -I "$built" -module-name "$name" -o "$built/$name.swiftmodule" "$@"
}
module CoreML App/Stubs/CoreML.swift
module ExecuTorch App/Stubs/ExecuTorch.swift
module LlamaBundle Sources/LlamaBundle/*.swift
swift swiftc -typecheck -I "$built" -module-name App App/Runners/*.swift
swift swiftc -parse App/Sources/*.swift
echo "check-app: runners and model type-checked against stubs, views parsed" >&2
