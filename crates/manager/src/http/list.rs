//! Pages of lists, with cursors that callers can't take apart.
//!
//! A cursor says behind which key the next page begins, so that what is inserted or removed meanwhile neither repeats
//! nor hides another item.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use berth_api::manager::{PAGE_LIMIT_DEFAULT, PAGE_LIMIT_MAX, Page};
use berth_model::Problem;

/// A page of items that are in ascending order of `key`, which is unique.
///
/// # Errors
/// A limit out of range; a cursor that was not given out.
pub fn page<I, T>(
    items: &[I],
    limit: Option<u32>,
    cursor: Option<&str>,
    key: impl Fn(&I) -> String,
    show: impl Fn(&I) -> T,
) -> Result<Page<T>, Problem> {
    cut(items, limit, cursor, &key, show, |item_key, after| item_key > after)
}

/// The same for items in descending order.
///
/// # Errors
/// As [`page`].
pub fn page_descending<I, T>(
    items: &[I],
    limit: Option<u32>,
    cursor: Option<&str>,
    key: impl Fn(&I) -> String,
    show: impl Fn(&I) -> T,
) -> Result<Page<T>, Problem> {
    cut(items, limit, cursor, &key, show, |item_key, after| item_key < after)
}

fn cut<I, T>(
    items: &[I],
    limit: Option<u32>,
    cursor: Option<&str>,
    key: &impl Fn(&I) -> String,
    show: impl Fn(&I) -> T,
    is_behind: fn(&str, &str) -> bool,
) -> Result<Page<T>, Problem> {
    let limit = limit_of(limit)?;
    let start = match cursor {
        Some(cursor) => {
            let after = open_cursor(cursor)?;
            items.partition_point(|item| !is_behind(&key(item), &after))
        }
        None => 0,
    };
    let rest = items.get(start..).unwrap_or_default();
    let shown = rest.get(..limit).unwrap_or(rest);
    let next_cursor = match shown.last() {
        Some(last) if shown.len() < rest.len() => Some(make_cursor(&key(last))),
        _ => None,
    };
    Ok(Page { items: shown.iter().map(show).collect(), next_cursor })
}

/// How many items a page is to have.
///
/// # Errors
/// When it is 0 or above [`PAGE_LIMIT_MAX`].
pub fn limit_of(limit: Option<u32>) -> Result<usize, Problem> {
    let limit = limit.unwrap_or(PAGE_LIMIT_DEFAULT);
    if limit == 0 || limit > PAGE_LIMIT_MAX {
        return Err(Problem::field("limit", limit, format!("1 to {PAGE_LIMIT_MAX}")));
    }
    Ok(usize::try_from(limit).unwrap_or(usize::MAX))
}

/// The cursor that goes on behind this key.
pub fn make_cursor(key: &str) -> String {
    URL_SAFE_NO_PAD.encode(key)
}

/// The key that a cursor goes on behind.
///
/// # Errors
/// When it is not a cursor that was given out.
pub fn open_cursor(cursor: &str) -> Result<String, Problem> {
    let bytes = URL_SAFE_NO_PAD.decode(cursor).ok();
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    text.ok_or_else(|| Problem::field("cursor", cursor, "the next_cursor of an earlier page"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(all: &[u32], limit: u32, mut between: impl FnMut(&mut Vec<u32>)) -> Vec<u32> {
        let (mut all, mut seen, mut cursor) = (all.to_vec(), Vec::new(), None::<String>);
        loop {
            let part = page(&all, Some(limit), cursor.as_deref(), |item| format!("{item:05}"), |item| *item)
                .expect("a page");
            seen.extend(part.items);
            match part.next_cursor {
                Some(next) => cursor = Some(next),
                None => return seen,
            }
            between(&mut all);
        }
    }

    #[test]
    fn pages_put_together_are_the_list() {
        let all: Vec<u32> = (0..23).collect();
        for limit in [1, 5, 22, 23, 24] {
            assert_eq!(pages(&all, limit, |_| ()), all);
        }
        assert_eq!(pages(&[], 5, |_| ()), Vec::<u32>::new());
    }

    #[test]
    fn what_comes_or_goes_between_pages_neither_repeats_nor_hides_others() {
        let all: Vec<u32> = (10..30).collect();
        let seen = pages(&all, 4, |items| {
            items.insert(0, 1);
            items.retain(|item| *item != 13 && *item != 14);
        });
        let expected: Vec<u32> = (10..30).filter(|item| *item != 14).collect();
        assert_eq!(seen, expected, "13 was shown before it went, 14 was not");
    }

    #[test]
    fn descending_pages_put_together_are_the_list() {
        let all: Vec<u32> = (0..11).rev().collect();
        let key = |item: &u32| format!("{item:05}");
        let first = page_descending(&all, Some(6), None, key, |item| *item).expect("a page");
        let second =
            page_descending(&all, Some(6), first.next_cursor.as_deref(), key, |item| *item).expect("a page");
        assert_eq!([first.items, second.items].concat(), all);
        assert_eq!(second.next_cursor, None);
    }

    #[test]
    fn nonsense_limits_and_cursors_are_refused_by_name() {
        let one =
            |limit, cursor| page(&[1], limit, cursor, u32::to_string, |item| *item).expect_err("refused");
        assert_eq!(one(Some(0), None).field.as_deref(), Some("limit"));
        assert_eq!(one(Some(PAGE_LIMIT_MAX + 1), None).field.as_deref(), Some("limit"));
        assert_eq!(one(None, Some("not base64!")).field.as_deref(), Some("cursor"));
    }
}
