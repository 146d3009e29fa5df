//! A moment in UTC, as text: `2026-11-23T18:35:54Z`.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Seconds since 1970, written as RFC 3339 has it. From 1970 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Date(u64);

/// The last second of 9999.
const LAST: u64 = 253_402_300_799;

/// Not of that form.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no date like 2026-11-23T18:35:54Z")]
pub struct NoDate(String);

impl Date {
    /// The present.
    pub fn now() -> Self {
        let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(elapsed.as_secs().min(LAST))
    }

    /// Year, month, day, hour, minute, second.
    fn fields(self) -> [u64; 6] {
        let (mut days, seconds) = (self.0 / 86_400, self.0 % 86_400);
        let mut year = 1970;
        while days >= days_of(year) {
            days -= days_of(year);
            year += 1;
        }
        let mut month = 1;
        while days >= days_in(year, month) {
            days -= days_in(year, month);
            month += 1;
        }
        [year, month, days + 1, seconds / 3600, seconds / 60 % 60, seconds % 60]
    }

    /// Seconds since 1970.
    pub fn seconds(self) -> u64 {
        self.0
    }

    /// For a file's name: `20261123T183554Z`.
    pub fn compact(self) -> String {
        self.to_string().replace(['-', ':'], "")
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of(year: u64) -> u64 {
    365 + u64::from(is_leap(year))
}

fn days_in(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [year, month, day, hour, minute, second] = self.fields();
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

impl From<Date> for String {
    fn from(date: Date) -> Self {
        date.to_string()
    }
}

impl TryFrom<String> for Date {
    type Error = NoDate;

    fn try_from(text: String) -> Result<Self, NoDate> {
        let parsed = || {
            let number = |from: usize, digits: usize| {
                let part = text.get(from..from + digits)?;
                part.bytes().all(|byte| byte.is_ascii_digit()).then(|| part.parse::<u64>().ok())?
            };
            let (year, month, day) = (number(0, 4)?, number(5, 2)?, number(8, 2)?);
            let (hour, minute, second) = (number(11, 2)?, number(14, 2)?, number(17, 2)?);
            let is_date =
                year >= 1970 && (1..=12).contains(&month) && day >= 1 && day <= days_in(year, month);
            if !is_date || hour > 23 || minute > 59 || second > 59 {
                return None;
            }
            let days = (1970..year).map(days_of).sum::<u64>()
                + (1..month).map(|month| days_in(year, month)).sum::<u64>()
                + (day - 1);
            let date = Self(days * 86_400 + hour * 3600 + minute * 60 + second);
            // Separators and length, too.
            (date.to_string() == text).then_some(date)
        };
        parsed().ok_or_else(|| NoDate(text.chars().take(40).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_moments() {
        assert_eq!(Date(0).to_string(), "1970-01-01T00:00:00Z");
        // The Unix time of 2000-02-29, a leap day of a year that is a multiple of 400, and of 2038-01-19T03:14:07Z.
        assert_eq!(Date(951_782_400).to_string(), "2000-02-29T00:00:00Z");
        assert_eq!(Date(2_147_483_647).to_string(), "2038-01-19T03:14:07Z");
        assert_eq!(Date(LAST).to_string(), "9999-12-31T23:59:59Z");
        assert_eq!(Date(2_147_483_647).compact(), "20380119T031407Z");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(seconds in 0..=LAST) {
            prop_assert_eq!(Date::try_from(Date(seconds).to_string()).unwrap(), Date(seconds));
        }

        #[test]
        fn other_text_is_refused(text in ".{0,24}") {
            let _ = Date::try_from(text);
        }
    }

    #[test]
    fn dates_that_never_were_are_refused() {
        for text in [
            "1969-12-31T23:59:59Z",
            "2023-02-29T00:00:00Z",
            "2023-01-01 00:00:00Z",
            "2023-01-01T24:00:00Z",
            "é",
        ] {
            assert!(Date::try_from(text.to_owned()).is_err(), "{text}");
        }
    }
}
