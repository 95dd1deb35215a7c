plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
    id("org.jetbrains.kotlin.plugin.compose")
}

// What `cargo xtask build-android` wrote: native libraries, and the Kotlin bindings as a source.
val edgellm = rootDir.resolve("../../../../dist/android")
val bindings = rootDir.resolve("../../../../dist/android/kotlin")

android {
    namespace = "org.edgellm.sample"
    compileSdk = 36

    defaultConfig {
        applicationId = "org.edgellm.sample"
        minSdk = 26
        targetSdk = 36
        versionCode = 1
        versionName = "1"
    }
    buildFeatures { compose = true }
    sourceSets["main"].jniLibs.srcDir(edgellm.resolve("jniLibs"))
    sourceSets["main"].kotlin.srcDir(bindings)
    // The model is mapped from its file, so it must not be compressed.
    androidResources { noCompress += "safetensors" }
}

kotlin { jvmToolchain(17) }

dependencies {
    // The bindings call the library through it.
    implementation("net.java.dev.jna:jna:5.17.0@aar")
    implementation(platform("androidx.compose:compose-bom:2025.09.00"))
    implementation("androidx.compose.material3:material3")
    implementation("androidx.activity:activity-compose:1.11.0")
}
