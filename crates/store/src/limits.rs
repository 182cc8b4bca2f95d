//! What no store takes, checked alike for all drivers before they see it.
//!
//! The bounds are etcd's defaults (128 operations, requests of 1.5 MiB) with room to spare, so that records written
//! here can move there.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::error::Error;
use crate::store::{Condition, Operation, Query, Revision};

/// Longest key. Longer ones would make the index, and every error that names a key, unreadable.
pub const KEY_BYTES_MAX: usize = 512;

/// Largest value. Raising it past a megabyte makes single records hold up all others, and etcd refuse them.
pub const VALUE_BYTES_MAX: usize = 1 << 20;

/// Most conditions, and most operations, of one transaction; etcd's default.
pub const OPERATIONS_MAX: usize = 128;

/// Most bytes of all keys and values of one transaction; one value of the largest size must fit.
pub const TRANSACTION_BYTES_MAX: usize = VALUE_BYTES_MAX + (1 << 18);

/// Longest lease. More is surely a mistake in units.
pub const LEASE_TTL_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// How much of an offending value goes into an error.
const SHOWN_CHARS_MAX: usize = 80;

pub(crate) fn check_key(key: &str) -> Result<(), Error> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX || key.contains('\0') {
        let expected = format!("1 to {KEY_BYTES_MAX} bytes without NUL");
        return Err(Error::Invalid { field: "key", value: shown(key), expected });
    }
    Ok(())
}

pub(crate) fn check_prefix(prefix: &str) -> Result<(), Error> {
    if prefix.len() > KEY_BYTES_MAX || prefix.contains('\0') {
        let expected = format!("at most {KEY_BYTES_MAX} bytes without NUL");
        return Err(Error::Invalid { field: "prefix", value: shown(prefix), expected });
    }
    Ok(())
}

pub(crate) fn check_query(query: &Query) -> Result<(), Error> {
    check_prefix(&query.prefix)?;
    if let Some(after) = &query.after {
        check_key(after)?;
    }
    if query.limit == Some(0) {
        let expected = "at least 1".to_owned();
        return Err(Error::Invalid { field: "limit", value: "0".to_owned(), expected });
    }
    Ok(())
}

/// A state can be read if it has been reached and is still kept.
pub(crate) fn check_readable(at: Revision, head: Revision, compacted: Revision) -> Result<(), Error> {
    if at < compacted {
        return Err(Error::Compacted { asked: at, oldest: compacted });
    }
    check_reached("revision", at, head)
}

pub(crate) fn check_reached(field: &'static str, asked: Revision, head: Revision) -> Result<(), Error> {
    if asked > head || asked == Revision::ABSENT {
        let expected = format!("1 to the store's revision, {head}");
        return Err(Error::Invalid { field, value: asked.to_string(), expected });
    }
    Ok(())
}

/// A watch needs all changes from its start on; those of the compacted revision itself may be gone.
pub(crate) fn check_watchable(from: Revision, compacted: Revision) -> Result<(), Error> {
    if from == Revision::ABSENT {
        let expected = "at least 1".to_owned();
        return Err(Error::Invalid { field: "from_revision", value: from.to_string(), expected });
    }
    if from <= compacted {
        return Err(Error::Compacted { asked: from, oldest: compacted.next() });
    }
    Ok(())
}

pub(crate) fn check_transaction(conditions: &[Condition], operations: &[Operation]) -> Result<(), Error> {
    check_count("conditions", conditions.len())?;
    check_count("operations", operations.len())?;
    for condition in conditions {
        check_key(&condition.key)?;
    }
    let mut bytes = conditions.iter().map(|condition| condition.key.len()).sum::<usize>();
    let mut keys = BTreeSet::new();
    for operation in operations {
        bytes += check_operation(operation)?;
        if !keys.insert(operation.key()) {
            let expected = "each key in one operation only".to_owned();
            return Err(Error::Invalid { field: "operations", value: shown(operation.key()), expected });
        }
    }
    if bytes > TRANSACTION_BYTES_MAX {
        let expected = format!("at most {TRANSACTION_BYTES_MAX} bytes of keys and values");
        return Err(Error::Invalid { field: "operations", value: format!("{bytes} bytes"), expected });
    }
    Ok(())
}

/// Returns the bytes that the operation carries.
fn check_operation(operation: &Operation) -> Result<usize, Error> {
    check_key(operation.key())?;
    let value_bytes = match operation {
        Operation::Put { value, .. } => value.len(),
        Operation::Delete { .. } => 0,
    };
    if value_bytes > VALUE_BYTES_MAX {
        let expected = format!("at most {VALUE_BYTES_MAX} bytes");
        return Err(Error::Invalid { field: "value", value: format!("{value_bytes} bytes"), expected });
    }
    Ok(operation.key().len() + value_bytes)
}

fn check_count(field: &'static str, count: usize) -> Result<(), Error> {
    if count > OPERATIONS_MAX {
        let expected = format!("at most {OPERATIONS_MAX}");
        return Err(Error::Invalid { field, value: count.to_string(), expected });
    }
    Ok(())
}

/// Returns the time to live in the whole milliseconds in which leases are kept, rounded up.
pub(crate) fn check_ttl(ttl: Duration) -> Result<Duration, Error> {
    if ttl.is_zero() || ttl > LEASE_TTL_MAX {
        let expected = format!("more than 0 and at most {} s", LEASE_TTL_MAX.as_secs());
        return Err(Error::Invalid { field: "ttl", value: format!("{ttl:?}"), expected });
    }
    let whole = Duration::from_millis(u64::try_from(ttl.as_millis()).expect("bounded right above"));
    Ok(if whole < ttl { whole + Duration::from_millis(1) } else { whole })
}

/// The smallest string greater than all that begin with `prefix`, or none if there is no such string.
///
/// Byte order of UTF-8 is the order of its characters, so the last character that has a successor gets it.
pub(crate) fn prefix_end(prefix: &str) -> Option<String> {
    let mut end = prefix.to_owned();
    while let Some(last) = end.pop() {
        // Surrogates are not characters: the step over them is part of `char`'s own range.
        if let Some(next) = (last..=char::MAX).nth(1) {
            end.push(next);
            return Some(end);
        }
    }
    None
}

/// The smallest key of a list: its prefix, or what follows the key that it is to go on after.
pub(crate) fn lower_bound(query: &Query) -> String {
    // No key holds a NUL, so nothing lies between a key and the same with a NUL behind it.
    let after = query.after.as_ref().map(|after| format!("{after}\0")).unwrap_or_default();
    after.max(query.prefix.clone())
}

fn shown(value: &str) -> String {
    let mut text: String = value.chars().take(SHOWN_CHARS_MAX).collect();
    if text.len() < value.len() {
        text.push('…');
    }
    format!("{text:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_the_next_string_that_does_not_begin_with_it() {
        assert_eq!(prefix_end("/vms/").as_deref(), Some("/vms0"));
        assert_eq!(prefix_end("a\u{d7ff}").as_deref(), Some("a\u{e000}"), "over the surrogates");
        assert_eq!(prefix_end("a\u{10ffff}").as_deref(), Some("b"));
        assert_eq!(prefix_end("\u{10ffff}"), None);
        assert_eq!(prefix_end(""), None);
    }

    #[test]
    fn a_time_to_live_is_never_shortened() {
        assert_eq!(check_ttl(Duration::from_nanos(1)).unwrap(), Duration::from_millis(1));
        assert_eq!(check_ttl(Duration::from_micros(1500)).unwrap(), Duration::from_millis(2));
        assert_eq!(check_ttl(LEASE_TTL_MAX).unwrap(), LEASE_TTL_MAX);
        assert!(check_ttl(Duration::ZERO).is_err());
        assert!(check_ttl(Duration::MAX).is_err());
    }

    #[test]
    fn an_error_shows_an_offending_key_shortened_and_escaped() {
        let error = check_key(&"x\n".repeat(10_000)).unwrap_err().to_string();
        assert!(error.len() < 300, "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
