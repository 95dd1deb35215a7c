use super::*;
use crate::error::Result;

fn write(path: &std::path::Path, tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Result<()> {
    let specs: Vec<_> = tensors.iter().map(|(n, d, s, _)| TensorSpec::new(*n, *d, *s)).collect();
    let mut writer = SafetensorsWriter::create(path, &specs)?;
    for (name, _, _, content) in tensors.iter().rev() {
        writer.write(name, content)?;
    }
    writer.finish()
}

#[test]
fn what_is_written_is_read_back_aligned() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let odd = [7u8; 6];
    let even: Vec<u8> = (0..128).collect();
    write(
        &path,
        &[("odd", Dtype::F16, &[3], &odd), ("even", Dtype::U32, &[4, 8], &even), ("none", Dtype::F32, &[0], &[])],
    )
    .unwrap();
    let read = Safetensors::open_dir(folder.path()).unwrap();
    assert_eq!(read.names().collect::<Vec<_>>(), ["even", "none", "odd"]);
    assert_eq!(read.slice("odd").unwrap(), odd);
    assert_eq!(&read.bytes("even").unwrap()[..], even);
    assert_eq!(read.entry("even").unwrap().shape, [4, 8]);
    assert_eq!(read.entry("even").unwrap().range.start % 64, 0);
    assert_eq!(read.entry("odd").unwrap().dtype, Dtype::F16);
    // The reference library reads it too.
    let content = std::fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&content).unwrap();
    assert_eq!(theirs.tensor("even").unwrap().data(), even);
}

#[test]
fn the_reference_library_s_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let values: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![2], &values).unwrap();
    std::fs::write(&path, safetensors::serialize([("a", view)], None).unwrap()).unwrap();
    assert_eq!(Safetensors::open(&path).unwrap().slice("a").unwrap(), values);
}

#[test]
fn shards_are_read_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    write(&dir.join("a.safetensors"), &[("x", Dtype::U8, &[1], &[1]), ("unlisted", Dtype::U8, &[1], &[9])]).unwrap();
    write(&dir.join("b.safetensors"), &[("y", Dtype::U8, &[2], &[2, 3])]).unwrap();
    let index = r#"{"metadata":{"total_size":3},"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}"#;
    std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    let read = Safetensors::open_dir(dir).unwrap();
    assert_eq!(read.names().collect::<Vec<_>>(), ["x", "y"]);
    assert_eq!(read.slice("y").unwrap(), [2, 3]);
    assert!(read.slice("unlisted").unwrap_err().to_string().contains("no tensor 'unlisted' among the 2"));
}

#[test]
fn the_writer_refuses_what_was_not_announced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let spec = TensorSpec::new("a", Dtype::F32, [2]);
    let check = |name: &str, content: &[u8], expected: &str| {
        let mut writer = SafetensorsWriter::create(&path, std::slice::from_ref(&spec)).unwrap();
        let error = writer.write(name, content).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("b", &[0; 8], "another name");
    check("a", &[0; 7], "expected 8 bytes, found 7 bytes");
    let mut writer = SafetensorsWriter::create(&path, std::slice::from_ref(&spec)).unwrap();
    writer.write("a", &[0; 8]).unwrap();
    assert!(writer.write("a", &[0; 8]).unwrap_err().to_string().contains("twice"));
    drop(writer);
    let writer = SafetensorsWriter::create(&path, std::slice::from_ref(&spec)).unwrap();
    assert!(writer.finish().unwrap_err().to_string().contains("expected its bytes"));
    assert!(SafetensorsWriter::create(&path, &[spec.clone(), spec.clone()]).is_err());
    let huge = TensorSpec::new("h", Dtype::F32, [usize::MAX, 2]);
    assert!(SafetensorsWriter::create(&path, &[huge]).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing may be left");
}

#[test]
fn parts_of_several_tensors_make_whole_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let specs = [TensorSpec::new("a", Dtype::U8, [5]), TensorSpec::new("b", Dtype::U8, [3])];
    let mut writer = SafetensorsWriter::create(&path, &specs).unwrap();
    for (name, content) in [("b", &[1u8][..]), ("a", &[1, 2]), ("b", &[2, 3]), ("a", &[3, 4, 5])] {
        writer.append(name, content).unwrap();
    }
    let error = writer.append("b", &[4]).unwrap_err().to_string();
    assert!(error.contains("expected 3 bytes, found 1 bytes after 3 bytes"), "{error}");
    assert!(writer.write("a", &[0; 5]).unwrap_err().to_string().contains("twice"));
    writer.finish().unwrap();
    let read = Safetensors::open(&path).unwrap();
    assert_eq!((read.slice("a").unwrap(), read.slice("b").unwrap()), (&[1, 2, 3, 4, 5][..], &[1, 2, 3][..]));

    let mut writer = SafetensorsWriter::create(&path, &specs).unwrap();
    writer.write("b", &[0; 3]).unwrap();
    writer.append("a", &[0; 4]).unwrap();
    assert!(writer.finish().unwrap_err().to_string().contains("found 4 of 5"));
    assert_eq!(Safetensors::open(&path).unwrap().slice("b").unwrap(), [1, 2, 3], "the old file stays");
}
