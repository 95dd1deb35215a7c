//! Products with prepared matrices: activations rounded to 8 bits, integer dot products.

use crate::arch::matmul::ColumnsMut;
use crate::arch::pool::{for_each_mut, threads};
use crate::arch::{Kernel, Part, Task, Tokens8};
use crate::format::{BLOCK, PANEL_ROWS};
use crate::panels::Panels;

/// Weights of an item of work at least: some microseconds.
const ITEM: usize = 1 << 15;
/// Items for each thread, so that faster cores can take more of them.
const ITEMS_PER_THREAD: usize = 8;

/// One product of [`multiply`].
pub(super) struct Product<'a, 'b> {
    pub(super) matrix: Panels<'a>,
    /// `[tokens, rows]`, backward `[tokens, cols]`.
    pub(super) out: &'b mut [f32],
}

/// `out = x W^T` or, backward, `out = x W`, for matrices of one width in one parallel region; added to `out` if
/// `accumulate`.
pub(super) fn multiply<'b>(
    x: &Tokens8,
    part: Part,
    products: impl IntoIterator<Item = Product<'b, 'b>>,
    accumulate: bool,
) {
    let (kernel, tokens) = (Kernel::active(), x.count());
    if tokens == 0 {
        return;
    }
    let mut items = Vec::new();
    for Product { matrix, out } in products {
        let layout = matrix.layout();
        let (parts, width, columns) = match part {
            Part::Forward => (layout.panels(), PANEL_ROWS, layout.rows),
            Part::Backward => (matrix.blocks(), BLOCK, layout.cols),
        };
        let work = x.blocks() * BLOCK * width * tokens;
        let per_item = match threads() {
            1 => parts,
            n => parts.div_ceil(n * ITEMS_PER_THREAD).max(ITEM.div_ceil(work)),
        };
        let columns = ColumnsMut::split(out, tokens, columns, per_item * width);
        items.extend(columns.into_iter().enumerate().map(|(i, out)| {
            let range = i * per_item..((i + 1) * per_item).min(parts);
            Some(Task { matrix, x, part, range, out, accumulate })
        }));
    }
    for_each_mut(&mut items, |_, task| {
        if let Some(task) = task.take() {
            task.run(kernel);
        }
    });
}
