//! What lies on a disk: records, reports, settings.

use std::path::Path;

use dom0_migrator::command::configuration::{Configuration, Rate};
use dom0_migrator::handover::{Duty, SourceState, State, TargetState, record};
use dom0_migrator::{html, report_file};
use guest_probe::config::Config;

/// A record that is taken says which side it is of, and what is to be done.
fn record_of<S: State>(data: &[u8]) {
    if let Ok(content) = record::Content::<S>::parse(data) {
        assert_eq!(content.side, S::SIDE);
        let _ = (content.state.duty() == Duty::Nothing, content.state.may_run());
        let again = serde_json::to_vec(&content).unwrap();
        assert_eq!(record::Content::<S>::parse(&again).as_ref(), Ok(&content));
    }
}

/// Records of both sides.
pub fn handover(data: &[u8]) {
    record_of::<SourceState>(data);
    record_of::<TargetState>(data);
    let _ = serde_json::from_slice::<record::Progress>(data);
}

/// A report that is taken can be drawn, and nothing that it says becomes a tag.
pub fn report(data: &[u8]) {
    let Ok(report) = report_file::parse(data) else { return };
    let again = serde_json::to_string(&report).unwrap();
    assert!(report_file::parse(again.as_bytes()).is_ok());
    assert!(!html::page(&report, None).contains("<script"), "a report became more than text");
    // JSON has no such number, but a report may say the word. Without that, it can only come of what the page calculates.
    let silent = report_file::parse(again.replace("NaN", "nan").as_bytes()).unwrap();
    assert!(!html::page(&silent, None).contains("NaN"), "a number of the page is none");
    let _ = html::page(&report, Some(&report));
}

/// Settings of both programs.
pub fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(configuration) = Configuration::parse(Path::new("migrator.toml"), text) {
        let _ = configuration.limit(None);
    }
    if let Ok(config) = Config::parse(Path::new("guest-probe.toml"), text) {
        assert!(config.check().is_ok());
        assert!(config.options().ring_bytes.is_power_of_two());
        let _ = (config.choice(), config.detach_after());
    }
    if let Ok(rate) = text.parse::<Rate>() {
        assert_eq!(rate.to_string().parse(), Ok(rate));
    }
}
