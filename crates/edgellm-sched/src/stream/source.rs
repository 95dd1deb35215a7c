//! Blocks as they are read from storage into a buffer.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::{AllocationProperty, Bytes, Device};
use edgellm_kernels::{PackedHost, PackedLayout};
use edgellm_model::ModelError;
use edgellm_model::decoder::{BlockVectors, LoadOptions, Loader, Weight};
use edgellm_model::files::{ModelFiles, packed_names};
use edgellm_model::io::{ALIGNMENT, StorageBuffer, StorageFile};
use edgellm_model::values::Projection;

/// Bytes that a thread reads at once.
const CHUNK: usize = 4 << 20;
/// Threads that read: storage answers several requests faster than one after the other.
const READERS: usize = 4;
/// Parts of a file that lie so close are read as one.
const GAP: u64 = 64 << 10;

/// A matrix in the buffer of its block.
#[derive(Clone, Debug)]
struct Part {
    name: String,
    layout: PackedLayout,
    codes: Range<usize>,
    scales: Range<usize>,
}

/// A part of a file that is read into a part of the buffer.
#[derive(Clone, Debug)]
struct Span {
    file: usize,
    offset: u64,
    at: usize,
    len: usize,
    /// Bytes of it that the tensors need.
    needed: usize,
}

/// How a block comes into its buffer.
#[derive(Clone, Debug)]
enum How {
    /// Read as it is stored.
    Stored(Vec<Span>),
    /// Through the map of the file, brought into the arrangement that the kernels read.
    Converted,
}

#[derive(Clone, Debug)]
struct BlockParts {
    parts: Vec<Part>,
    how: How,
    bytes: usize,
}

/// A model's blocks on storage.
#[derive(Debug)]
pub struct BlockSource {
    model: ModelFiles,
    options: LoadOptions,
    files: Vec<StorageFile>,
    blocks: Vec<BlockParts>,
}

impl BlockSource {
    /// The blocks of a model for the CPU device.
    ///
    /// # Errors
    /// A tensor is missing or has another shape than the configuration says, a file cannot be opened, or the options are for
    /// another device.
    pub fn open(model: &ModelFiles, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.expand || options.device != Device::flex() {
            return Err(ModelError::Value {
                what: "device of weights that are streamed from storage".into(),
                expected: "flex, the CPU".into(),
                found: format!("{:?}", options.device),
            });
        }
        let mut source = Self { model: model.clone(), options: options.clone(), files: Vec::new(), blocks: Vec::new() };
        for index in 0..model.config().n_layers {
            let block = source.parts(index)?;
            source.blocks.push(block);
        }
        Ok(source)
    }

    /// Number of blocks.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Bytes of a buffer for block `index`.
    pub fn bytes(&self, index: usize) -> usize {
        self.blocks[index].bytes
    }

    /// Whether every block is used as it is stored.
    pub fn is_ready(&self) -> bool {
        self.blocks.iter().all(|block| matches!(block.how, How::Stored(_)))
    }

    /// Whether reads go past the system's cache of files.
    pub fn is_direct(&self) -> bool {
        self.is_ready() && self.files.iter().all(StorageFile::is_direct)
    }

    /// Layouts of block `index`'s matrices, as they will be used.
    pub fn layouts(&self, index: usize) -> Vec<PackedLayout> {
        self.blocks[index].parts.iter().map(|part| part.layout).collect()
    }

    /// How fast a block is read here and now, in bytes per second.
    ///
    /// # Errors
    /// The storage fails.
    pub fn measure_rate(&self) -> Result<f64, ModelError> {
        let mut buffer = StorageBuffer::new(self.bytes(0));
        buffer.as_mut().fill(1);
        let start = Instant::now();
        self.fill(0, &mut buffer)?;
        Ok(self.bytes(0) as f64 / start.elapsed().as_secs_f64().max(1e-9))
    }

    /// What block `index` has beside its matrices.
    ///
    /// # Errors
    /// A tensor is missing, has another shape than the configuration says, or cannot be read.
    pub fn vectors(&self, index: usize) -> Result<BlockVectors, ModelError> {
        self.loader().vectors(index)
    }

    fn loader(&self) -> Loader<'_> {
        Loader::new(&self.model, &self.options)
    }

    fn parts(&mut self, index: usize) -> Result<BlockParts, ModelError> {
        let (mut parts, mut places) = (Vec::new(), Vec::new());
        let mut stored = true;
        for projection in Projection::ALL {
            let name = projection.weight_name(index);
            let found = self.model.layout(&name)?;
            let layout = self.loader().placed(found);
            let of_matrix = self.model.places(&name)?.filter(|_| found == layout);
            let of_matrix = of_matrix.map(|both| both.map(|place| (place.path.to_owned(), place.range)));
            stored &= of_matrix.is_some();
            places.extend(of_matrix.into_iter().flatten());
            parts.push(Part { name, layout, codes: 0..0, scales: 0..0 });
        }
        if !stored {
            let mut at = 0;
            for part in &mut parts {
                for (range, [rows, cols]) in
                    [(&mut part.codes, part.layout.words_shape()), (&mut part.scales, part.layout.scales_shape())]
                {
                    *range = at..at + rows * cols * 4;
                    at = range.end.next_multiple_of(64);
                }
            }
            return Ok(BlockParts { parts, how: How::Converted, bytes: at.next_multiple_of(ALIGNMENT) });
        }
        let places: Vec<(usize, Range<u64>)> =
            places.into_iter().map(|(path, range)| Ok((self.file(path)?, range))).collect::<Result<_, ModelError>>()?;
        let spans = spans(&places);
        for (part, both) in parts.iter_mut().zip(places.chunks(2)) {
            for (range, (file, place)) in [&mut part.codes, &mut part.scales].into_iter().zip(both) {
                *range = in_buffer(&spans, *file, place);
            }
        }
        let bytes = spans.iter().map(|span| span.len).sum();
        Ok(BlockParts { parts, how: How::Stored(spans), bytes })
    }

    /// The number of a file, which is opened the first time.
    fn file(&mut self, path: PathBuf) -> Result<usize, ModelError> {
        if let Some(found) = self.files.iter().position(|file| file.path() == path) {
            return Ok(found);
        }
        self.files.push(StorageFile::open(&path)?);
        Ok(self.files.len() - 1)
    }

    /// Reads block `index`.
    ///
    /// # Errors
    /// The storage fails, or a file is shorter than it was: the first tensor that is not whole is named.
    pub fn fill(&self, index: usize, buffer: &mut StorageBuffer) -> Result<(), ModelError> {
        let block = &self.blocks[index];
        match &block.how {
            How::Stored(spans) => spans.iter().try_for_each(|span| self.fill_span(block, span, buffer.as_mut())),
            How::Converted => self.convert(index, block, buffer.as_mut()),
        }
    }

    fn fill_span(&self, block: &BlockParts, span: &Span, buffer: &mut [u8]) -> Result<(), ModelError> {
        let file = &self.files[span.file];
        let target = &mut buffer[span.at..span.at + span.len];
        // Each thread takes every so-many-th chunk.
        let mut shares: Vec<Vec<(usize, &mut [u8])>> = (0..READERS).map(|_| Vec::new()).collect();
        for (i, chunk) in target.chunks_mut(CHUNK).enumerate() {
            shares[i % READERS].push((i * CHUNK, chunk));
        }
        let read = |share: Vec<(usize, &mut [u8])>| -> Result<(), ModelError> {
            for (at, chunk) in share {
                let expected = chunk.len().min(span.needed.saturating_sub(at));
                let failed = |n, found| self.incomplete(block, span, span.at + at + n, found);
                let n = file.read_at(chunk, span.offset + at as u64).map_err(|error| failed(0, error.to_string()))?;
                if n < expected {
                    let end = span.offset + (at + n) as u64;
                    return Err(failed(n, format!("the end of the file at byte {end}")));
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let mut shares = shares.into_iter().filter(|share| !share.is_empty());
            let own = shares.next();
            let others: Vec<_> = shares.map(|share| scope.spawn(move || read(share))).collect();
            let first = own.map_or(Ok(()), read);
            let rest = others.into_iter().map(|other| other.join().expect("a read does not panic"));
            rest.fold(first, |result, next| result.and(next))
        })
    }

    /// The error of a read that failed at position `at` of the buffer.
    fn incomplete(&self, block: &BlockParts, span: &Span, at: usize, found: String) -> ModelError {
        let all = block.parts.iter().flat_map(|part| {
            let (codes, scales) = packed_names(&part.name);
            [(codes, part.codes.clone()), (scales, part.scales.clone())]
        });
        let hit = all.filter(|(_, range)| range.end > at).min_by_key(|(_, range)| range.start);
        let (tensor, range) = hit.unwrap_or_else(|| (block.parts[0].name.clone(), block.parts[0].codes.clone()));
        let position = |at: usize| span.offset + at.saturating_sub(span.at) as u64;
        ModelError::Tensor {
            path: self.files[span.file].path().to_owned(),
            tensor,
            expected: format!("bytes {} to {} of the file", position(range.start), position(range.end)),
            found,
        }
    }

    fn convert(&self, index: usize, block: &BlockParts, buffer: &mut [u8]) -> Result<(), ModelError> {
        for (projection, part) in Projection::ALL.into_iter().zip(&block.parts) {
            let Weight::Packed(matrix) = self.loader().one(index, projection)? else {
                unreachable!("the options place packed weights");
            };
            let host = matrix.to_host()?;
            assert_eq!(host.layout, part.layout, "the layout that was announced");
            buffer[part.codes.clone()].copy_from_slice(&host.words);
            buffer[part.scales.clone()].copy_from_slice(&host.scales);
            self.model.release(&part.name);
        }
        Ok(())
    }

    /// The matrices of block `index` in a filled buffer, which they share.
    ///
    /// # Errors
    /// A mask is not what its format asks for.
    pub fn weights(&self, index: usize, buffer: &bytes::Bytes) -> Result<[Weight; 7], ModelError> {
        let view = |range: &Range<usize>| Bytes::from_shared(buffer.slice(range.clone()), AllocationProperty::Native);
        let mut weights = Vec::with_capacity(Projection::ALL.len());
        for part in &self.blocks[index].parts {
            let host = PackedHost::from_parts(part.layout, view(&part.codes), view(&part.scales))?;
            host.check()?;
            weights.push(Weight::Packed(host.to_device(&self.options.device)));
        }
        Ok(weights.try_into().expect("one matrix per projection"))
    }
}

/// The parts of the files that hold these places, each read whole.
fn spans(places: &[(usize, Range<u64>)]) -> Vec<Span> {
    let mut sorted: Vec<&(usize, Range<u64>)> = places.iter().filter(|(_, range)| !range.is_empty()).collect();
    sorted.sort_by_key(|(file, range)| (*file, range.start));
    let mut joined: Vec<(usize, Range<u64>)> = Vec::new();
    for (file, range) in sorted {
        match joined.last_mut() {
            Some((last, whole)) if last == file && range.start <= whole.end + GAP => {
                whole.end = whole.end.max(range.end);
            }
            _ => joined.push((*file, range.clone())),
        }
    }
    let mut at = 0;
    let align = ALIGNMENT as u64;
    let span = |(file, range): (usize, Range<u64>)| {
        let offset = range.start / align * align;
        let needed = (range.end - offset) as usize;
        let span = Span { file, offset, at, len: needed.next_multiple_of(ALIGNMENT), needed };
        at += span.len;
        span
    };
    joined.into_iter().map(span).collect()
}

/// Where a place of a file is in the buffer.
fn in_buffer(spans: &[Span], file: usize, place: &Range<u64>) -> Range<usize> {
    let holds =
        |span: &&Span| span.file == file && span.offset <= place.start && place.end <= span.offset + span.len as u64;
    let Some(span) = spans.iter().find(holds) else { return 0..0 };
    let start = span.at + (place.start - span.offset) as usize;
    start..start + (place.end - place.start) as usize
}
