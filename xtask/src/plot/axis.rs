//! Round numbers for an axis.

/// From zero to a round number, in round steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Axis {
    /// Where it ends.
    pub end: f64,
    /// From tick to tick.
    pub step: f64,
}

impl Axis {
    /// An axis on which everything up to `most` has its place, with four to eight steps.
    pub fn up_to(most: f64) -> Self {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let magnitude = 10_f64.powf((most / 5.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|factor| factor * magnitude)
            .into_iter()
            .find(|step| most / step <= 6.5)
            .unwrap_or(10.0 * magnitude);
        Self { end: (most / step - 1e-9).ceil() * step, step }
    }

    /// All ticks, zero and the end among them.
    pub fn ticks(self) -> Vec<f64> {
        let steps = (self.end / self.step).round() as u32;
        (0..=steps).map(|number| f64::from(number) * self.step).collect()
    }

    /// A tick in words, with as many decimals as the step needs.
    pub fn label(self, value: f64) -> String {
        let decimals = (-self.step.log10().floor()).max(0.0) as usize;
        format!("{value:.decimals$}")
    }
}

/// A value in words: three digits that matter.
pub fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_its_place_and_ticks_are_round() {
        for most in [0.003, 0.7, 1.0, 4.2, 9.99, 10.0, 746.3, 198.2, 123_456.0] {
            let axis = Axis::up_to(most);
            let ticks = axis.ticks();
            assert!(axis.end >= most && axis.end < most * 1.5, "{most}: {axis:?}");
            assert!((4..=9).contains(&ticks.len()), "{most}: {ticks:?}");
        }
        assert_eq!(Axis::up_to(746.3).label(200.0), "200");
        assert_eq!(Axis::up_to(0.7).label(0.2), "0.2");
    }

    #[test]
    fn nothing_gives_an_axis_too() {
        for most in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(Axis::up_to(most).end, 1.0);
        }
    }
}
