import SwiftUI

@main
struct LlamaBundleApp: App {
    @State private var model = AppModel(
        folder: Bundle.main.url(forResource: "bundle", withExtension: nil),
        scratch: URL.applicationSupportDirectory.appending(path: "LlamaBundle"))

    var body: some Scene {
        WindowGroup {
            ContentView(model: model).task { await model.start() }
        }
    }
}
