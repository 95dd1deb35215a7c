//! Recovery brings a packed model closer to its base, in the formats that it has.

use std::sync::Arc;

use burn::tensor::Device;
use edgellm_kernels::{Format, PackedHost, PackedLayout};
use edgellm_model::decoder::{Decoder, ResidentStore, Weight};
use edgellm_model::generate::to_vec;
use edgellm_model::testing::tiny_decoder;
use edgellm_model::values::Projection;
use edgellm_tune::recover::{RecoverConfig, Recovery};

/// The decoder with the matrices of its blocks rounded to a format; prepared, as they are loaded, or not.
fn rounded(base: &Decoder, format: &str, prepared: bool) -> Decoder {
    let blocks = (0..base.n_blocks()).map(|index| {
        let mut block = base.store().block(index).unwrap();
        for linear in &mut block.linears {
            let [rows, cols] = linear.weight.shape();
            let layout = PackedLayout::new(rows, cols, Format::parse(format).unwrap()).unwrap();
            let mut host = PackedHost::quantize(&to_vec(linear.weight.dequantize()).unwrap(), layout).unwrap();
            if prepared {
                host = host.prepare().unwrap();
            }
            linear.weight = Weight::Packed(host.to_device(base.device()));
        }
        block
    });
    base.clone().with_store(Arc::new(ResidentStore::new(blocks.collect())))
}

fn windows(n: usize) -> Vec<Vec<u32>> {
    (0..n).map(|w| (0..24).map(|i| (w * 131 + i * i * 7 + i * w) as u32 % 256).collect()).collect()
}

fn as_slices(windows: &[Vec<u32>]) -> Vec<&[u32]> {
    windows.iter().map(Vec::as_slice).collect()
}

#[test]
fn the_divergence_falls_also_on_text_that_was_not_seen() {
    let base = tiny_decoder(3, &Device::flex());
    let all = windows(44);
    let (text, held_out) = (as_slices(&all[..40]), as_slices(&all[40..]));
    for (format, prepared) in [("q2g32a", false), ("q3g32a-8", true), ("q3g64s", true)] {
        let config = RecoverConfig { steps: 40, batch: 4, scale_rate: 5e-3, norm_rate: 5e-3 };
        let mut recovery = Recovery::new(&base, rounded(&base, format, prepared), config).unwrap();
        let before = recovery.divergence(&held_out).unwrap();
        for step in 0..40 {
            let report = recovery.step(&text[step % 10 * 4..step % 10 * 4 + 4]).unwrap();
            assert_eq!(report.step, step as u64);
        }
        let after = recovery.divergence(&held_out).unwrap();
        assert!(after < 0.95 * before, "{format}: {before} to {after}");
        let layout = recovery.decoder().store().layouts(1).unwrap()[Projection::Up as usize];
        assert_eq!(layout.format.name(), format);
    }
}

#[test]
fn what_cannot_be_recovered_is_refused() {
    let base = tiny_decoder(3, &Device::flex());
    let config = RecoverConfig::default();
    let refusal = |decoder: Decoder, config| Recovery::new(&base, decoder, config).err().unwrap().to_string();
    assert!(refusal(base.clone(), config).contains("quantized"), "a float model");
    assert!(refusal(rounded(&base, "q4g32s-2:4", false), config).contains("without sparsity"));
    assert!(refusal(rounded(&base, "q4g32a", false), RecoverConfig { steps: 0, ..config }).contains("at least 1"));
}
