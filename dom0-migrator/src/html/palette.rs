//! Colours, one for each way of a page and each class of bytes, for light and for dark.
//!
//! Chosen from Okabe and Ito's set and moved until the test below was content: in both schemes any two differ enough, for those who
//! see all colours and for those who lack one kind of cone.

use crate::engine::Way;

/// A colour's name in the style sheet, what it stands for, and its values in the light and in the dark scheme.
pub struct Colour {
    /// Its class.
    pub name: &'static str,
    /// In the light scheme, as `0xRRGGBB`.
    pub light: u32,
    /// In the dark one.
    pub dark: u32,
}

const fn colour(name: &'static str, light: u32, dark: u32) -> Colour {
    Colour { name, light, dark }
}

/// All colours.
pub const COLOURS: [Colour; 9] = [
    colour("no-data", 0x00e6_e8ec, 0x0026_2a31),
    colour("zero", 0x00b4_b9c2, 0x005a_606b),
    colour("raw", 0x00e6_9f00, 0x00e6_9f00),
    colour("resent", 0x00b3_3a00, 0x00e0_5a1a),
    colour("page-table", 0x0000_9e73, 0x0012_a67c),
    colour("referenced", 0x0056_b4e9, 0x009a_d8ff),
    colour("accepted", 0x0000_66b3, 0x002f_86d6),
    colour("refused", 0x00d6_4fa0, 0x00f2_7cc0),
    colour("replaced", 0x004b_2378, 0x00f5_ec7a),
];

/// A way's class in the style sheet.
pub fn name(way: Way) -> &'static str {
    match way {
        Way::Unseen | Way::NoData => "no-data",
        Way::Zero => "zero",
        Way::Raw => "raw",
        Way::Resent => "resent",
        Way::PageTable => "page-table",
        Way::Referenced => "referenced",
        Way::Accepted => "accepted",
        Way::Refused => "refused",
        Way::Replaced => "replaced",
    }
}

/// A way in words: short, and what it means.
pub fn words(way: Way) -> (&'static str, &'static str) {
    match way {
        Way::Unseen => ("not there", "the guest has no such page"),
        Way::NoData => ("without content", "named in the stream, nothing in it"),
        Way::Zero => ("zero", "all zeros: a marker went"),
        Way::Raw => ("sent", "went over the network, once"),
        Way::Resent => ("sent again", "written to meanwhile, went over the network in a later pass"),
        Way::PageTable => ("page table", "always goes over the network"),
        Way::Referenced => ("referenced", "by reference, not settled when the migration ended"),
        Way::Accepted => ("from storage", "by reference: the target read it from the shared disk"),
        Way::Refused => ("refused", "by reference, but the disk had other bytes: went over the network"),
        Way::Replaced => ("not in time", "by reference, but storage was too slow: went over the network"),
    }
}

/// The style sheet's part with the colours: variables, and a fill for each class.
pub fn css() -> String {
    let variables = |value: fn(&Colour) -> u32| {
        COLOURS.iter().map(|colour| format!("--{}:#{:06x};", colour.name, value(colour))).collect::<String>()
    };
    let fills: String = COLOURS
        .iter()
        .map(|colour| format!(".{0}{{fill:var(--{0});--own:var(--{0})}}", colour.name))
        .collect();
    format!(
        ":root{{{}}}@media (prefers-color-scheme:dark){{@media screen{{:root{{{}}}}}}}{fills}",
        variables(|colour| colour.light),
        variables(|colour| colour.dark)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linear red, green and blue.
    fn linear(rgb: u32) -> [f64; 3] {
        [16, 8, 0].map(|shift| {
            let value = f64::from(rgb >> shift & 0xff) / 255.0;
            if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        })
    }

    /// CIE L*a*b* (D65) of linear RGB.
    fn lab(rgb: [f64; 3]) -> [f64; 3] {
        let rows = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]];
        let white = [0.9505, 1.0, 1.089];
        let [x, y, z] = std::array::from_fn(|i| {
            let value = rows[i].iter().zip(rgb).map(|(a, b)| a * b.clamp(0.0, 1.0)).sum::<f64>() / white[i];
            if value > 0.008_856 { value.cbrt() } else { 7.787 * value + 16.0 / 116.0 }
        });
        [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
    }

    /// What is seen without one kind of cone: Machado, Oliveira and Fernandes (2009), severity 1.
    const SEEN: [(&str, [[f64; 3]; 3]); 4] = [
        ("all cones", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
        ("no long ones", [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
        ("no medium ones", [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
        ("no short ones", [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
    ];

    #[test]
    fn any_two_colours_can_be_told_apart_by_anybody() {
        let mut close = Vec::new();
        for (scheme, value) in [("light", (|c| c.light) as fn(&Colour) -> u32), ("dark", |c| c.dark)] {
            for (eyes, matrix) in SEEN {
                let seen = COLOURS.each_ref().map(|colour| {
                    let rgb = linear(value(colour));
                    lab(matrix.map(|row| row.iter().zip(rgb).map(|(a, b)| a * b).sum()))
                });
                for (i, a) in seen.iter().enumerate() {
                    for (j, b) in seen.iter().enumerate().skip(i + 1) {
                        let distance = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
                        // A difference of 2.3 is just noticed side by side; of cells apart, several times that.
                        if distance < 13.0 {
                            let (a, b) = (COLOURS[i].name, COLOURS[j].name);
                            close.push(format!("{scheme}, {eyes}: {a} and {b} differ by {distance:.1}"));
                        }
                    }
                }
            }
        }
        assert!(close.is_empty(), "{close:#?}");
    }

    #[test]
    fn every_way_has_a_colour_and_words() {
        for way in Way::ALL {
            assert!(COLOURS.iter().any(|colour| colour.name == name(way)));
            assert!(!words(way).0.is_empty());
        }
    }
}
