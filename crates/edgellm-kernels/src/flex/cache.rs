//! The key-value cache of the CPU: one block's keys and values in half precision, 8 bits or `f32`, in the arrangement
//! that attention reads.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::arch::{Elements, KEYS};

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CacheType {
    /// Single precision.
    F32,
    /// Half precision.
    #[default]
    F16,
    /// 8 bits, with a scale per position and head.
    Int8,
}

impl CacheType {
    /// All of them.
    pub const ALL: [CacheType; 3] = [CacheType::F32, CacheType::F16, CacheType::Int8];

    /// `f32`, `f16` or `int8`.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Int8 => "int8",
        }
    }
}

impl core::fmt::Display for CacheType {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

impl core::str::FromStr for CacheType {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|t| t.name() == name);
        found.ok_or_else(|| format!("'{name}' is no type of a cache; expected f32, f16 or int8"))
    }
}

/// Elements of one key head after the other; within a head, blocks of 16 positions.
#[derive(Debug, Clone)]
enum Store {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Int8(Vec<i8>, Vec<f32>),
}

impl Store {
    fn new(kind: CacheType, positions: usize, dim: usize) -> Self {
        match kind {
            CacheType::F32 => Store::F32(vec![0.0; positions * dim]),
            CacheType::F16 => Store::F16(vec![0; positions * dim]),
            CacheType::Int8 => Store::Int8(vec![0; positions * dim], vec![0.0; positions]),
        }
    }

    /// A head's elements.
    fn head(&self, head: usize, capacity: usize, dim: usize) -> Elements<'_> {
        let (start, n) = (head * capacity * dim, capacity * dim);
        match self {
            Store::F32(v) => Elements::F32(&v[start..start + n]),
            Store::F16(v) => Elements::F16(&v[start..start + n]),
            Store::Int8(v, scales) => Elements::Int8(&v[start..start + n], &scales[head * capacity..][..capacity]),
        }
    }

    /// Writes a vector at `start`, its elements `stride` apart; `position` counts over all heads.
    fn put(&mut self, position: usize, start: usize, stride: usize, x: &[f32], half: &mut [f16]) {
        fn scatter<T>(to: &mut [T], stride: usize, values: impl Iterator<Item = T>) {
            to.iter_mut().step_by(stride).zip(values).for_each(|(to, value)| *to = value);
        }
        match self {
            Store::F32(v) => scatter(&mut v[start..], stride, x.iter().copied()),
            Store::F16(v) => {
                half.convert_from_f32_slice(x);
                scatter(&mut v[start..], stride, half.iter().map(|h| h.to_bits()));
            }
            Store::Int8(v, scales) => {
                let scale = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                scales[position] = scale;
                scatter(&mut v[start..], stride, x.iter().map(|x| (x * inverse).round() as i8));
            }
        }
    }

    /// Copies the first `n` positions (rounded up to blocks) of every head into a store of another capacity.
    fn copy_to(&self, to: &mut Store, heads: usize, from_capacity: usize, to_capacity: usize, n: usize, dim: usize) {
        fn copy<T: Copy>(from: &[T], to: &mut [T], heads: usize, from_len: usize, to_len: usize, n: usize) {
            for head in 0..heads {
                to[head * to_len..head * to_len + n].copy_from_slice(&from[head * from_len..head * from_len + n]);
            }
        }
        let n = n.next_multiple_of(KEYS);
        let (a, b, c) = (from_capacity * dim, to_capacity * dim, n * dim);
        match (self, to) {
            (Store::F32(from), Store::F32(to)) => copy(from, to, heads, a, b, c),
            (Store::F16(from), Store::F16(to)) => copy(from, to, heads, a, b, c),
            (Store::Int8(from, from_scales), Store::Int8(to, to_scales)) => {
                copy(from, to, heads, a, b, c);
                copy(from_scales, to_scales, heads, from_capacity, to_capacity, n);
            }
            _ => unreachable!("stores of one cache have one type"),
        }
    }
}

/// Keys and values of one block for one sequence, in the arrangement of the CPU's attention.
#[derive(Debug, Clone)]
pub struct BlockCache {
    kind: CacheType,
    heads: usize,
    dim: usize,
    len: usize,
    /// A multiple of 16.
    capacity: usize,
    keys: Store,
    values: Store,
}

impl BlockCache {
    /// An empty cache of `heads` key heads of `dim` dimensions.
    ///
    /// # Panics
    /// If `dim` is not a multiple of 16.
    pub fn new(kind: CacheType, heads: usize, dim: usize) -> Self {
        assert!(dim > 0 && dim.is_multiple_of(KEYS), "heads of {dim} dimensions");
        let store = || Store::new(kind, 0, dim);
        BlockCache { kind, heads, dim, len: 0, capacity: 0, keys: store(), values: store() }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes of storage.
    pub fn bytes(&self) -> usize {
        let element = match self.kind {
            CacheType::F32 => 4,
            CacheType::F16 => 2,
            CacheType::Int8 => 1,
        };
        let scales = if self.kind == CacheType::Int8 { 4 } else { 0 };
        2 * self.heads * self.capacity * (self.dim * element + scales)
    }

    pub(super) fn shape(&self) -> (usize, usize) {
        (self.heads, self.dim)
    }

    /// Appends `[tokens, heads * dim]` keys and values.
    pub(super) fn append(&mut self, keys: &[f32], values: &[f32]) {
        let width = self.heads * self.dim;
        assert!(keys.len() == values.len() && keys.len().is_multiple_of(width), "keys and values of width {width}");
        let tokens = keys.len() / width;
        self.reserve(self.len + tokens);
        let mut half = vec![f16::ZERO; self.dim];
        for (token, (keys, values)) in keys.chunks(width).zip(values.chunks(width)).enumerate() {
            let position = self.len + token;
            for (head, (key, value)) in keys.chunks(self.dim).zip(values.chunks(self.dim)).enumerate() {
                let at = head * self.capacity + position;
                let block = head * self.capacity + position / KEYS * KEYS;
                self.keys.put(at, block * self.dim + position % KEYS, KEYS, key, &mut half);
                self.values.put(at, at * self.dim, 1, value, &mut half);
            }
        }
        self.len += tokens;
    }

    fn reserve(&mut self, positions: usize) {
        if positions <= self.capacity {
            return;
        }
        // By half: less is wasted at the end of a long text than by doubling.
        let capacity = positions.max(self.capacity + self.capacity / 2).next_multiple_of(64);
        for store in [&mut self.keys, &mut self.values] {
            let mut grown = Store::new(self.kind, self.heads * capacity, self.dim);
            store.copy_to(&mut grown, self.heads, self.capacity, capacity, self.len, self.dim);
            *store = grown;
        }
        self.capacity = capacity;
    }

    /// Keys and values of a head.
    pub(super) fn head(&self, head: usize) -> (Elements<'_>, Elements<'_>) {
        (self.keys.head(head, self.capacity, self.dim), self.values.head(head, self.capacity, self.dim))
    }
}
