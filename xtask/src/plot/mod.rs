//! Pictures of figures, as SVG: bars with their spread, and time lines. The same figures give the same bytes.

mod axis;
mod bars;
mod lines;
mod svg;

pub use bars::{Bars, Group};
pub use lines::{Line, Lines, Span};

/// One of the things that are compared, the same colour in every picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Series {
    /// What the legend calls it.
    pub name: &'static str,
    /// Its colour.
    pub colour: &'static str,
}
