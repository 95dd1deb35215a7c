//! Writes a GGUF model as a Hugging Face directory of f32 weights, tokenizer and chat template included.
//!
//! usage: gguf_to_floats FILE.gguf DIRECTORY

use std::path::Path;
use std::process::ExitCode;

use edgellm_kernels::{Format, PackedHost};
use edgellm_model::ModelError;
use edgellm_model::files::ModelFiles;
use edgellm_model::save::ModelWriter;

fn convert(source: &Path, target: &Path) -> Result<(), ModelError> {
    let files = ModelFiles::open(source)?;
    let mut writer = ModelWriter::create(target, &files, None, |_, _| Format::F32)?;
    for name in files.names().filter(|name| files.layout(name).is_ok()) {
        let matrix = files.matrix(name)?;
        let layout = matrix.layout;
        writer.write(name, &PackedHost::from_f32(matrix.dequantize(), layout.rows, layout.cols)?)?;
    }
    writer.finish(false)
}

#[expect(clippy::print_stderr, reason = "a command's message")]
fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [source, target] = arguments.as_slice() else {
        eprintln!("usage: gguf_to_floats FILE.gguf DIRECTORY");
        return ExitCode::from(2);
    };
    match convert(Path::new(source), Path::new(target)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
