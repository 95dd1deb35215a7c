//! Running a model that is larger than memory: some blocks stay in memory, the others are read from storage while the
//! blocks before them compute.
//!
//! [`place`] chooses which blocks stay; [`StreamedStore`] executes that. Blocks that are read lie in a fixed number of buffers,
//! so that the weights never take more than they were given. Which block comes next is learned from the order in which blocks
//! are asked for: round and round for inference, up and down again for tuning.

mod place;
mod source;
mod store;

pub use place::{Placement, PlacementError, Step, place, timeline};
pub use source::BlockSource;
pub use store::{Streamed, StreamedStore};
