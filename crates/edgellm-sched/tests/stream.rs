//! A model whose blocks are streamed computes what the same model in memory does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use edgellm_kernels::{Arrangement, BlockGradients, BlockScratch, Format};
use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::{Activations, Decoder, LoadOptions, SlicePass};
use edgellm_model::files::ModelFiles;
use edgellm_model::generate::to_vec;
use edgellm_model::synth::{Packing, write_random_model};
use edgellm_model::testing::{tiny_config_json, tiny_model_dir};
use edgellm_model::traits::WeightStore;
use edgellm_sched::stream::{BlockSource, Placement, StreamedStore, place};
use serde_json::json;

const IDS: [u32; 9] = [5, 200, 17, 99, 257, 0, 42, 1, 2];
const BLOCKS: usize = 6;

fn model(folder: &Path, format: &str, arrangement: Arrangement) -> PathBuf {
    let (tokenizer, target) = (folder.join("tiny"), folder.join("model"));
    tiny_model_dir(&tokenizer, 0).unwrap();
    let mut config = tiny_config_json();
    config["num_hidden_layers"] = json!(BLOCKS);
    let packing = Packing { format: Format::parse(format).unwrap(), arrangement };
    write_random_model(&target, config, &tokenizer, packing, 3, true, &mut |_, _| {}).unwrap();
    target
}

fn options(activations: Activations) -> LoadOptions {
    LoadOptions { device: Device::flex(), expand: false, activations }
}

/// A store with so many buffers, in which the blocks of `resident` stay.
fn streamed(files: &ModelFiles, options: &LoadOptions, resident: &[usize], slots: usize) -> StreamedStore {
    let source = BlockSource::open(files, options).unwrap();
    let resident = (0..source.n_blocks()).map(|index| resident.contains(&index)).collect();
    let placement = Placement { resident, slots, bytes: 0, read_bytes: 0, seconds: 0.0 };
    StreamedStore::new(source, &placement).unwrap()
}

fn decoder(files: &ModelFiles, options: &LoadOptions, store: StreamedStore) -> (Decoder, Arc<StreamedStore>) {
    let store = Arc::new(store);
    (Decoder::load_around(files, options, || Ok(store.clone())).unwrap(), store)
}

/// Logits of a prompt and of tokens one by one.
fn logits(decoder: &Decoder) -> Vec<f32> {
    let mut cache = decoder.new_cache();
    let mut out = to_vec(decoder.forward(&IDS[..5], None, Some(&mut cache)).unwrap()).unwrap();
    for id in &IDS[5..] {
        out.extend(to_vec(decoder.forward(&[*id], None, Some(&mut cache)).unwrap()).unwrap());
    }
    out
}

#[test]
fn logits_are_those_of_the_model_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    for (format, arrangement, activations) in [
        ("q4g32a", Arrangement::Panels, Activations::Int8),
        ("q4g32s", Arrangement::Rows, Activations::Int8),
        ("q3g32a", Arrangement::Panels, Activations::F32),
        ("q8g32s-2:4", Arrangement::Rows, Activations::F32),
        ("f16", Arrangement::Rows, Activations::Int8),
    ] {
        let files = ModelFiles::open(&model(folder.path(), format, arrangement)).unwrap();
        let options = options(activations);
        let expected = logits(&Decoder::load(&files, &options).unwrap());
        for (resident, slots) in [(&[][..], 1), (&[], 2), (&[0, 3], 2), (&[1, 2, 4, 5], 1), (&[2], 4)] {
            let store = streamed(&files, &options, resident, slots);
            let (decoder, store) = decoder(&files, &options, store);
            assert!(logits(&decoder) == expected, "{format}, {resident:?} stay, {slots} buffers");
            let (read, block) = (store.streamed(), BlockSource::open(&files, &options).unwrap().bytes(1) as u64);
            // Five passes; the thread may have read ahead for a sixth.
            let passes = 5 * (BLOCKS - resident.len()) as u64;
            assert!(read.bytes >= (passes - slots as u64) * block / 2 && read.reading > 0.0, "{read:?}");
            assert!(read.bytes <= (passes + slots as u64 + 1) * (block + (8 << 10)), "{read:?} of {block} a block");
        }
        let ready = arrangement == Arrangement::Panels && activations == Activations::Int8;
        let ready = ready || format == "q8g32s-2:4";
        assert_eq!(BlockSource::open(&files, &options).unwrap().is_ready(), ready, "{format}");
    }
}

/// Up and down, as tuning goes, with the same gradients.
#[test]
fn tuning_passes_agree() {
    let folder = tempfile::tempdir().unwrap();
    let files = ModelFiles::open(&model(folder.path(), "q4g32a", Arrangement::Panels)).unwrap();
    let options = options(Activations::Int8);
    let run = |decoder: &Decoder| {
        let mut found = Vec::new();
        let lora = edgellm_model::adapter::LoraConfig {
            rank: 2,
            alpha: 4.0,
            use_rslora: false,
            targets: edgellm_model::adapter::Targets::all_linear(),
        };
        let adapter = Adapter::new(decoder.config(), lora, 7, &Device::flex()).unwrap();
        for _ in 0..3 {
            let mut x = decoder.embed_slices(&[&IDS]).unwrap();
            let (mut scratch, mut tapes) = (BlockScratch::default(), Vec::new());
            let lengths = [IDS.len()];
            let mut pass = SlicePass::new(decoder, &adapter, &lengths, &mut scratch);
            pass.forward(&mut x, 0..2).unwrap();
            pass.record(&mut x, 2..BLOCKS, |_| false, &mut tapes).unwrap();
            let mut head = decoder.loss_on_slices(&x, BLOCKS, &adapter, &IDS, 1.0);
            let mut gradients: Vec<BlockGradients> = (2..BLOCKS).map(|_| BlockGradients::default()).collect();
            pass.backward(&mut head.d_hidden, 2..BLOCKS, &mut tapes, &mut gradients).unwrap();
            found.push((head.loss, head.d_hidden));
        }
        found
    };
    let expected = run(&Decoder::load(&files, &options).unwrap());
    for (resident, slots) in [(&[][..], 1), (&[0, 4], 2), (&[], 3)] {
        let (decoder, _) = decoder(&files, &options, streamed(&files, &options, resident, slots));
        assert!(run(&decoder) == expected, "{resident:?} stay, {slots} buffers");
    }
}

#[test]
fn a_block_that_is_held_keeps_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let files = ModelFiles::open(&model(folder.path(), "q4g32a", Arrangement::Panels)).unwrap();
    let options = options(Activations::Int8);
    let store = streamed(&files, &options, &[], 3);
    let values = |block: &edgellm_model::decoder::Block| to_vec(block.linears[6].weight.dequantize()).unwrap();
    let held = store.block(1).unwrap();
    let before = values(&held);
    for index in [2, 3, 4, 5, 0, 1, 2, 1, 0, 5] {
        assert_eq!(values(&store.block(index).unwrap()) == before, index == 1, "block {index}");
    }
    assert!(values(&held) == before);
    // A block outlives the store.
    drop(store);
    assert!(values(&held) == before);
}

#[test]
fn a_file_that_became_shorter_is_told_by_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "q4g32a", Arrangement::Panels);
    let files = ModelFiles::open(&path).unwrap();
    let store = streamed(&files, &options(Activations::Int8), &[0], 1);
    let weights = path.join("model.safetensors");
    let name = "model.layers.4.self_attn.o_proj.weight";
    let [codes, _] = files.places(name).unwrap().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&weights).unwrap();
    file.set_len(codes.range.start + 10).unwrap();
    for _ in 0..2 {
        store.block(1).unwrap();
        let error = store.block(4).unwrap_err().to_string();
        assert!(error.contains("model.layers.4.self_attn.o_proj.qweight"), "{error}");
        assert!(error.contains("model.safetensors") && error.contains("the end of the file"), "{error}");
    }
    assert!(store.block(BLOCKS).is_err());
    assert!(store.layouts(BLOCKS).is_err() && store.layouts(4).unwrap().len() == 7);
}

#[test]
fn a_placement_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let files = ModelFiles::open(&model(folder.path(), "q4g32a", Arrangement::Panels)).unwrap();
    let options = options(Activations::Int8);
    let source = BlockSource::open(&files, &options).unwrap();
    let sizes: Vec<u64> = (0..BLOCKS).map(|index| source.bytes(index) as u64).collect();
    let rate = source.measure_rate().unwrap();
    let placement = place(&sizes, &[1e-3; BLOCKS], rate, sizes[0] * 7 / 2).unwrap();
    assert!(placement.streams() && placement.bytes <= sizes[0] * 7 / 2);
    let store = StreamedStore::new(source, &placement).unwrap();
    for index in (0..BLOCKS).cycle().take(3 * BLOCKS) {
        store.block(index).unwrap();
    }
    let streamed = placement.resident.iter().filter(|stays| !**stays).count() as u64;
    assert!(store.streamed().bytes >= 2 * streamed * sizes[0], "{:?}", store.streamed());
}
