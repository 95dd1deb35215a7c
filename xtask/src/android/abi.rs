//! Android's ABIs and what each means to Rust, to the NDK and in a file.

use anyhow::{Result, bail};

/// An ABI that can be built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Abi {
    /// As Android and Gradle name it.
    pub(crate) name: &'static str,
    /// Rust's target.
    pub(crate) target: &'static str,
    /// The NDK's prefix of clang, before the API level.
    pub(super) clang: &'static str,
    /// The processor in an ELF header, as `binary::Elf` names it.
    pub(super) machine: &'static str,
    /// The same as `object` names it.
    pub(super) architecture: &'static str,
    /// 64-bit libraries must be ready for pages of 16 KB.
    pub(super) wide: bool,
}

/// Every ABI that is supported.
pub(crate) const ABIS: [Abi; 3] = [
    Abi {
        name: "arm64-v8a",
        target: "aarch64-linux-android",
        clang: "aarch64-linux-android",
        machine: "aarch64",
        architecture: "aarch64",
        wide: true,
    },
    Abi {
        name: "x86_64",
        target: "x86_64-linux-android",
        clang: "x86_64-linux-android",
        machine: "x86-64",
        architecture: "x86_64",
        wide: true,
    },
    Abi {
        name: "armeabi-v7a",
        target: "armv7-linux-androideabi",
        clang: "armv7a-linux-androideabi",
        machine: "arm",
        architecture: "arm",
        wide: false,
    },
];

impl Abi {
    /// # Errors
    /// No ABI of this name.
    pub(crate) fn find(name: &str) -> Result<&'static Self> {
        if let Some(abi) = ABIS.iter().find(|abi| abi.name == name) {
            return Ok(abi);
        }
        let names: Vec<_> = ABIS.iter().map(|abi| abi.name).collect();
        let meant = ABIS.iter().find(|abi| abi.target == name || name.starts_with(&abi.name[..3]));
        let hint = meant.map_or(String::new(), |abi| format!("; did you mean {}?", abi.name));
        bail!("there is no ABI {name:?}; expected some of {}{hint}", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_androids() {
        assert_eq!(Abi::find("arm64-v8a").unwrap().target, "aarch64-linux-android");
        let error = Abi::find("arm64").unwrap_err().to_string();
        assert!(error.contains("\"arm64\"") && error.contains("did you mean arm64-v8a?"), "{error}");
        let error = Abi::find("mips").unwrap_err().to_string();
        assert!(error.ends_with("arm64-v8a, x86_64, armeabi-v7a"), "{error}");
    }
}
