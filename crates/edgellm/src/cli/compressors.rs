//! The compressors by their names.

use clap::ValueEnum;
use edgellm::luc::{Gptq, Rtn, ScaleSearch, Wanda};
use edgellm::model::traits::Compressor;

/// How matrices are brought into a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressorChoice {
    /// Round to nearest; prune by magnitude
    Rtn,
    /// Round to nearest on the grids of least error, weighed by the energy of the inputs
    ScaleSearch,
    /// Prune by weight times input; round as scale-search does
    Wanda,
    /// Round with error feedback, on fitted grids; prune as SparseGPT does
    #[value(alias = "sparsegpt")]
    Gptq,
}

impl CompressorChoice {
    pub(crate) fn compressor(self) -> Box<dyn Compressor> {
        match self {
            Self::Rtn => Box::new(Rtn),
            Self::ScaleSearch => Box::new(ScaleSearch),
            Self::Wanda => Box::new(Wanda),
            Self::Gptq => Box::new(Gptq::default()),
        }
    }
}
