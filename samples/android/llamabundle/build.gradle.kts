plugins {
    alias(libs.plugins.kotlin.jvm)
}

kotlin {
    compilerOptions {
        jvmTarget.set(org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_17)
    }
}

java {
    sourceCompatibility = JavaVersion.VERSION_17
    targetCompatibility = JavaVersion.VERSION_17
}

dependencies {
    api(libs.serialization.json) // the elements alone: no compiler plugin
}

/** LLAMA_BUNDLE names the bundle that the tests take. */
val bundleTests by tasks.registering(JavaExec::class) {
    mainClass.set("llamabundle.TestingKt")
    classpath = sourceSets["test"].runtimeClasspath
}

tasks.named("check") { dependsOn(bundleTests) }
