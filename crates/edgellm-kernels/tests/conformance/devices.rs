//! Which devices this build and this machine have.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use burn::tensor::Device;
use edgellm_kernels::{Isa, active_isa, force_isa};

/// A device to test: its name, the tolerance of its arithmetic, and the instruction set if it is the CPU's.
pub(crate) struct Present {
    pub name: String,
    pub device: Device,
    /// Largest allowed error, relative to the largest magnitude of the expected result (or 1).
    pub tolerance: f64,
    /// Whether it is slow enough that suites choose fewer shapes.
    pub slow: bool,
    pub isa: Option<Isa>,
}

/// A device that is not tested, and why.
pub(crate) struct Absent {
    pub name: &'static str,
    pub why: String,
}

/// Every device of this build, once for each instruction set that the kernels have on this CPU.
pub(crate) fn devices() -> (Vec<Present>, Vec<Absent>) {
    let mut present: Vec<Present> = Isa::available()
        .into_iter()
        .map(|isa| Present {
            name: format!("flex ({isa})"),
            device: Device::flex(),
            tolerance: 2e-6,
            slow: false,
            isa: Some(isa),
        })
        .collect();
    let mut absent = Vec::new();
    match ndarray() {
        Ok(device) => {
            present.push(Present { name: "ndarray".into(), device, tolerance: 2e-6, slow: false, isa: None });
        }
        Err(why) => absent.push(Absent { name: "ndarray", why }),
    }
    match wgpu() {
        Ok(device) => present.push(Present { name: "wgpu".into(), device, tolerance: 2e-5, slow: true, isa: None }),
        Err(why) => absent.push(Absent { name: "wgpu", why }),
    }
    (present, absent)
}

#[cfg(feature = "ndarray")]
#[allow(deprecated)]
fn ndarray() -> Result<Device, String> {
    Ok(Device::ndarray())
}

#[cfg(not(feature = "ndarray"))]
fn ndarray() -> Result<Device, String> {
    Err("feature off".into())
}

#[cfg(feature = "wgpu")]
fn wgpu() -> Result<Device, String> {
    use burn::tensor::{DeviceKind, Tensor};
    let probe = std::panic::catch_unwind(|| {
        let device = Device::wgpu(DeviceKind::default());
        Tensor::<1>::ones([1], &device).into_data();
        device
    });
    probe.map_err(|_| "no adapter".into())
}

#[cfg(not(feature = "wgpu"))]
fn wgpu() -> Result<Device, String> {
    Err("feature off".into())
}

/// The chosen instruction set is one per process, so tests take turns.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: OnceLock<Mutex<()>> = OnceLock::new();
    TURN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a test on every device that is present, and says so.
pub(crate) fn on_every_device(what: &str, test: impl Fn(&Present)) {
    let _turn = turn();
    let (present, absent) = devices();
    let default = active_isa();
    for device in &present {
        if let Some(isa) = device.isa {
            force_isa(isa).expect("listed as available");
            assert_eq!(active_isa(), isa);
        }
        test(device);
        if let Some(isa) = device.isa {
            assert_eq!(active_isa(), isa, "another instruction set ran");
        }
    }
    force_isa(default).expect("it was active");
    let ran = present.iter().map(|d| format!("{} ran", d.name));
    let not = absent.iter().map(|d| format!("{} not run ({})", d.name, d.why));
    eprintln!("conformance: {what}: {}", ran.chain(not).collect::<Vec<_>>().join(", "));
}

#[test]
fn devices_are_those_of_the_features() {
    let (present, absent) = devices();
    let has = |name: &str| present.iter().any(|d| d.name.starts_with(name));
    assert!(has("flex (scalar)"), "the scalar reference runs everywhere");
    assert_eq!(has("ndarray"), cfg!(feature = "ndarray"));
    if cfg!(feature = "wgpu") {
        assert!(has("wgpu") || absent.iter().any(|d| d.name == "wgpu" && d.why == "no adapter"));
    } else {
        assert!(absent.iter().any(|d| d.name == "wgpu" && d.why == "feature off"));
    }
    // Nothing is both, and nothing is forgotten.
    assert_eq!(present.iter().filter(|d| d.isa.is_none()).count() + absent.len(), 2);
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt");
        assert_eq!(has("flex (avx2)"), avx2);
        let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        assert_eq!(has("flex (avx512)"), avx512);
        let vnni = is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vbmi2");
        assert_eq!(has("flex (avx512vnni)"), avx512 && vnni);
    }
    #[cfg(target_arch = "aarch64")]
    {
        assert!(has("flex (neon)"));
        let dotprod = std::arch::is_aarch64_feature_detected!("dotprod");
        assert_eq!(has("flex (neon+dotprod)"), dotprod);
        assert_eq!(has("flex (neon+i8mm)"), dotprod && std::arch::is_aarch64_feature_detected!("i8mm"));
    }
}

#[test]
fn kernels_of_other_processors_are_refused() {
    let _turn = turn();
    let available = Isa::available();
    for isa in Isa::ALL {
        assert_eq!(force_isa(isa).is_ok(), available.contains(&isa), "{isa}");
    }
    let best = *available.last().unwrap();
    force_isa(best).unwrap();
    assert_eq!(active_isa(), best);
    for kernel in edgellm_kernels::kernels() {
        assert_eq!(kernel.isa, best);
        assert!(!kernel.operator.is_empty() && !kernel.method.is_empty());
    }
}
