//! The few shapes that the pictures are made of.

use std::fmt::Write;

/// Where a text stands to its place.
#[derive(Clone, Copy, Debug)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// Its middle is there.
    Middle,
    /// It ends there.
    End,
}

/// How a text looks.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Height of its letters, in pixels.
    pub size: u32,
    /// Its colour.
    pub colour: &'static str,
    /// Where it stands.
    pub anchor: Anchor,
}

/// A picture that is being drawn.
pub struct Svg {
    body: String,
    width: u32,
    height: u32,
}

/// Text and axes.
pub const INK: &str = "#1f2933";
/// What explains.
pub const FAINT: &str = "#616e7c";
/// Lines behind everything.
pub const GRID: &str = "#e4e7eb";

impl Svg {
    /// An empty picture on white, so that it can be read on any page.
    pub fn new(width: u32, height: u32) -> Self {
        Self { body: String::new(), width, height }
    }

    fn put(&mut self, shape: std::fmt::Arguments<'_>) {
        // Writing into a String cannot fail.
        let _ = self.body.write_fmt(shape);
        self.body.push('\n');
    }

    /// A filled rectangle.
    pub fn rectangle(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), colour: &str) {
        self.put(format_args!(
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#
        ));
    }

    /// A straight line.
    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str, width: f64) {
        self.put(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}" stroke-width="{width}"/>"#
        ));
    }

    /// A dot with a white rim.
    pub fn dot(&mut self, (x, y): (f64, f64), colour: &str) {
        self.put(format_args!(
            r##"<circle cx="{x:.1}" cy="{y:.1}" r="2.6" fill="{colour}" stroke="#ffffff" stroke-width="1"/>"##
        ));
    }

    /// A line through points.
    pub fn path(&mut self, points: &[(f64, f64)], colour: &str) {
        let mut all = String::new();
        for (x, y) in points {
            let _ = write!(all, "{x:.1},{y:.1} ");
        }
        self.put(format_args!(
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>"#,
            all.trim_end()
        ));
    }

    /// A text.
    pub fn text(&mut self, (x, y): (f64, f64), style: Style, text: &str) {
        let anchor = match style.anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        self.put(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{}" fill="{}" text-anchor="{anchor}">{text}</text>"#,
            style.size, style.colour
        ));
    }

    /// The whole file.
    pub fn finish(self) -> String {
        let Self { body, width, height } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             font-family=\"Helvetica, Arial, DejaVu Sans, sans-serif\">\n<rect width=\"{width}\" height=\"{height}\" \
             fill=\"#ffffff\"/>\n{body}</svg>\n"
        )
    }
}

/// Width of a text, about: letters of these fonts are a little over half as wide as high.
pub fn width_of(text: &str, size: u32) -> f64 {
    text.chars().count() as f64 * f64::from(size) * 0.56
}
