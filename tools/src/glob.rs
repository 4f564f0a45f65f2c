//! Patterns over display paths: `*` stands for any characters (dots too), `?` for one; everything
//! else for itself.
//!
//! Always holds: matching takes time in proportion to pattern times path at most, whatever the
//! pattern.

/// Whether all of `path` fits `pattern`.
pub(crate) fn matches(pattern: &str, path: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let path: Vec<char> = path.chars().collect();
    let (mut at, mut in_path) = (0, 0);
    // Where to go on if the last `*` must stand for one character more.
    let mut retry: Option<(usize, usize)> = None;
    while in_path < path.len() {
        match pattern.get(at) {
            Some('*') => {
                retry = Some((at + 1, in_path));
                at += 1;
            }
            Some(&expected) if expected == '?' || expected == path[in_path] => {
                at += 1;
                in_path += 1;
            }
            _ => {
                let Some((after_star, start)) = retry else { return false };
                retry = Some((after_star, start + 1));
                at = after_star;
                in_path = start + 1;
            }
        }
    }
    pattern[at..].iter().all(|left| *left == '*')
}

/// Whether `path` fits one of the patterns.
pub(crate) fn matches_any(patterns: &[String], path: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, path))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stars_cross_dots() {
        for pattern in ["*", "model.*", "*.weight", "m*e*t", "model.layers.0.weight", "model.*.?.*"]
        {
            assert!(matches(pattern, "model.layers.0.weight"), "{pattern}");
        }
        for pattern in ["", "model", "model.?", "*.bias", "?", "*weight."] {
            assert!(!matches(pattern, "model.layers.0.weight"), "{pattern}");
        }
        assert!(matches("", "") && matches("**", "") && !matches("?", ""));
        assert!(matches("[a]", "[a]") && !matches("[a]", "a"));
    }

    #[test]
    fn many_stars_end_quickly() {
        let pattern = "*a".repeat(1000);
        assert!(!matches(&pattern, &format!("{}b", "a".repeat(5000))));
    }

    /// What matching means, by its definition.
    fn by_definition(pattern: &[char], path: &[char]) -> bool {
        match pattern {
            [] => path.is_empty(),
            ['*', rest @ ..] => {
                (0..=path.len()).any(|skipped| by_definition(rest, &path[skipped..]))
            }
            [first, rest @ ..] => path.split_first().is_some_and(|(head, tail)| {
                (*first == '?' || first == head) && by_definition(rest, tail)
            }),
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(pattern in "[ab.*?]{0,8}", path in "[ab.]{0,10}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            let expected = by_definition(&chars(&pattern), &chars(&path));
            prop_assert_eq!(matches(&pattern, &path), expected);
        }
    }
}
