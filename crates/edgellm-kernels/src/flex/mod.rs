//! x
impl crate::ops::EdgeOps for burn::backend::Flex {}
