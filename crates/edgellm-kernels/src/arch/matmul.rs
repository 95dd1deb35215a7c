//! Single-threaded products of small tiles, with the `gemm` crate, and columns of one buffer for several threads.

use core::marker::PhantomData;
use core::ops::Range;

use gemm::Parallelism;

/// A matrix in a slice, with any strides.
#[derive(Clone, Copy)]
pub(crate) struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix whose rows are `stride` apart.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(), "[{rows}, {cols}] by {stride}");
        MatRef { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        MatRef {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// Some columns of a row-major matrix, to be written by one thread while others write other columns.
pub(crate) struct ColumnsMut<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    buffer: PhantomData<&'a mut [f32]>,
}

// SAFETY: a value is the only access to its elements; see `split`.
unsafe impl Send for ColumnsMut<'_> {}

impl<'a> ColumnsMut<'a> {
    /// Splits `[rows, cols]` into ranges of `width` columns (the last may be narrower).
    ///
    /// # Panics
    /// If the slice is not `rows * cols` long, or `width` is 0.
    pub(crate) fn split(data: &'a mut [f32], rows: usize, cols: usize, width: usize) -> Vec<ColumnsMut<'a>> {
        assert_eq!(data.len(), rows * cols, "[{rows}, {cols}]");
        let start = data.as_mut_ptr();
        (0..cols)
            .step_by(width)
            .map(|col| ColumnsMut {
                // SAFETY: `col < cols <= data.len()` (if there are rows; an empty buffer is never dereferenced).
                // Values own disjoint ranges of columns, and borrow the slice for their lifetime.
                start: if rows == 0 { start } else { unsafe { start.add(col) } },
                rows,
                cols: width.min(cols - col),
                stride: cols,
                buffer: PhantomData,
            })
            .collect()
    }

    /// A whole matrix whose rows are `stride` apart.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn whole(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> ColumnsMut<'a> {
        assert!(stride >= cols, "rows overlap");
        assert!(rows == 0 || (rows - 1) * stride + cols <= data.len(), "[{rows}, {cols}] by {stride}");
        ColumnsMut { start: data.as_mut_ptr(), rows, cols, stride, buffer: PhantomData }
    }

    /// Some rows of some of these columns, while `self` is not used.
    ///
    /// # Panics
    /// If there are no such rows or columns.
    pub(crate) fn part(&mut self, rows: Range<usize>, cols: Range<usize>) -> ColumnsMut<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        let empty = rows.is_empty() || cols.is_empty();
        ColumnsMut {
            // SAFETY: the first element of the part lies in the buffer; an empty part is never dereferenced.
            start: if empty { self.start } else { unsafe { self.start.add(rows.start * self.stride + cols.start) } },
            rows: rows.len(),
            cols: cols.len(),
            stride: self.stride,
            buffer: PhantomData,
        }
    }

    /// One row of these columns.
    ///
    /// # Panics
    /// If there is no such row.
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row's elements lie in the buffer, and this value is the only access to them.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.cols) }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The first element.
    pub(super) fn start(&self) -> *mut f32 {
        self.start
    }

    /// Elements between rows.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// `self = factor * a * b`, or `self += factor * a * b`.
    ///
    /// # Panics
    /// If shapes disagree.
    pub(crate) fn product(&mut self, a: MatRef, b: MatRef, factor: f32, accumulate: bool) {
        assert!(
            a.rows == self.rows && b.cols == self.cols && a.cols == b.rows,
            "[{}, {}] = [{}, {}] [{}, {}]",
            self.rows,
            self.cols,
            a.rows,
            a.cols,
            b.rows,
            b.cols
        );
        if self.rows == 0 || self.cols == 0 {
            return;
        }
        // SAFETY: `MatRef` and `ColumnsMut` guarantee that every element of the three matrices lies in its buffer,
        // the output is borrowed mutably and so overlaps no input, and its elements are initialized.
        unsafe {
            gemm::gemm(
                self.rows,
                self.cols,
                a.cols,
                self.start,
                1,
                self.stride as isize,
                accumulate,
                a.data.as_ptr(),
                a.col_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr(),
                b.col_stride as isize,
                b.row_stride as isize,
                1.0,
                factor,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}
