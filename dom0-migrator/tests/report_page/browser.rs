//! Debian's Chromium without a screen.

use std::fs::File;
use std::path::Path;
use std::process::Command;

/// What Chromium needs on a machine without a screen and without a network, as root.
const FLAGS: [&str; 11] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
];

/// What it wrote to the two outputs.
pub struct Said {
    pub stdout: String,
    /// Lines of the page's console: errors of the page, of its policy, of its style.
    pub console: Vec<String>,
}

/// Opens a page, with more flags.
pub fn open(page: &Path, flags: &[&str]) -> Said {
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new("chromium")
        .args(FLAGS)
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(flags)
        .arg(format!("file://{}", page.display()))
        .output()
        .expect("this test looks at a page in Debian's package chromium, which `cargo xtask setup` installs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "chromium ended with {}: {stderr}", output.status);
    Said {
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        console: stderr.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect(),
    }
}

/// The page as the browser has understood it.
pub fn dom(page: &Path) -> Said {
    open(page, &["--dump-dom"])
}

/// A picture: width, height, and red, green and blue of each point.
pub struct Picture {
    pub width: u32,
    pub height: u32,
    pub points: Vec<[u8; 3]>,
}

/// A picture of the page in a window of this size. `dark`: as someone sees it who prefers dark pages.
pub fn screenshot(page: &Path, size: (u32, u32), dark: bool, file: &Path) -> Picture {
    let (screenshot, window) =
        (format!("--screenshot={}", file.display()), format!("--window-size={},{}", size.0, size.1));
    let scheme = format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 });
    let said = open(page, &[&screenshot, &window, &scheme]);
    assert_eq!(said.console, Vec::<String>::new());
    let mut decoder = png::Decoder::new(std::io::BufReader::new(File::open(file).unwrap()));
    decoder.set_transformations(png::Transformations::normalize_to_color8() | png::Transformations::STRIP_16);
    let mut reader = decoder.read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    let each = info.color_type.samples();
    assert!(each >= 3, "{:?}", info.color_type);
    let points =
        bytes[..info.buffer_size()].chunks_exact(each).map(|point| [point[0], point[1], point[2]]).collect();
    Picture { width: info.width, height: info.height, points }
}
