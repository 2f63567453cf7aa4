//! The time that a template is told.

use std::fmt::Write as _;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

use super::RenderError;

/// The time where the engine runs.
#[derive(Clone, Debug)]
pub struct Clock {
    at: Option<Timestamp>,
    zone: TimeZone,
}

impl Clock {
    /// The time now, in this machine's zone.
    pub fn here() -> Self {
        Self { at: None, zone: TimeZone::system() }
    }

    /// The time now, in a zone of the IANA's database; `None` where it is not known.
    pub fn named(zone: &str) -> Option<Self> {
        Some(Self { at: None, zone: TimeZone::get(zone).ok()? })
    }

    /// One time, in seconds since 1970, for ever.
    pub fn fixed(seconds: i64) -> Self {
        Self { at: Some(Timestamp::from_second(seconds).unwrap_or_default()), zone: TimeZone::UTC }
    }

    fn now(&self) -> Zoned {
        self.at.unwrap_or_else(Timestamp::now).to_zoned(self.zone.clone())
    }

    /// `datetime.now().strftime(format)`, in the C locale.
    pub fn format(&self, format: &str) -> Result<String, RenderError> {
        let now = self.now();
        let mut out = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                out.push(letter);
                continue;
            }
            let mut directive = letters.next();
            let bare = directive == Some('-');
            if bare {
                directive = letters.next();
            }
            let Some(directive) = directive else { return unsupported(format) };
            if bare && !"dmHIMSjy".contains(directive) {
                return unsupported(format);
            }
            write(&now, directive, bare, &mut out).map_or_else(|| unsupported(format), |()| Ok(String::new()))?;
        }
        Ok(out)
    }
}

fn unsupported(format: &str) -> Result<String, RenderError> {
    Err(RenderError::Unsupported(format!("the time as {format:?}")))
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

fn write(now: &Zoned, directive: char, bare: bool, out: &mut String) -> Option<()> {
    let weekday = usize::try_from(now.weekday().to_sunday_zero_offset()).ok()?;
    let month = MONTHS.get(usize::try_from(now.month() - 1).ok()?)?;
    let twelve = match now.hour() % 12 {
        0 => 12,
        hour => hour,
    };
    let number = |out: &mut String, value: i16, width: usize| {
        let width = if bare { 0 } else { width };
        write!(out, "{value:0width$}").ok()
    };
    match directive {
        '%' => out.push('%'),
        'n' => out.push('\n'),
        't' => out.push('\t'),
        'd' => number(out, now.day().into(), 2)?,
        'm' => number(out, now.month().into(), 2)?,
        'H' => number(out, now.hour().into(), 2)?,
        'I' => number(out, twelve.into(), 2)?,
        'M' => number(out, now.minute().into(), 2)?,
        'S' => number(out, now.second().into(), 2)?,
        'j' => number(out, now.day_of_year(), 3)?,
        'y' => number(out, now.year() % 100, 2)?,
        'Y' => write!(out, "{}", now.year()).ok()?,
        'e' => write!(out, "{:2}", now.day()).ok()?,
        'f' => write!(out, "{:06}", now.subsec_nanosecond() / 1000).ok()?,
        'p' => out.push_str(if now.hour() < 12 { "AM" } else { "PM" }),
        'A' => out.push_str(DAYS.get(weekday)?),
        'a' => out.push_str(DAYS.get(weekday)?.get(..3)?),
        'B' => out.push_str(month),
        'b' | 'h' => out.push_str(month.get(..3)?),
        'w' => write!(out, "{weekday}").ok()?,
        'F' => write!(out, "{}-{:02}-{:02}", now.year(), now.month(), now.day()).ok()?,
        'T' | 'X' => write!(out, "{:02}:{:02}:{:02}", now.hour(), now.minute(), now.second()).ok()?,
        'R' => write!(out, "{:02}:{:02}", now.hour(), now.minute()).ok()?,
        'D' | 'x' => write!(out, "{:02}/{:02}/{:02}", now.month(), now.day(), now.year() % 100).ok()?,
        // Times of Python that know no zone write nothing.
        'z' | 'Z' => {}
        _ => return None,
    }
    Some(())
}
