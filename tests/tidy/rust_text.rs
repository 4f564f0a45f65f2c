//! Rust source with its comments and literals blanked out, so that rules see code only.
//!
//! Always holds: the result has the same lines as the source, each with the same characters in the
//! same columns, a space standing for every character of a comment, string or character literal.

/// `source` with comments and literals as spaces.
pub(crate) fn code_of(source: &str) -> String {
    let characters: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < characters.len() {
        let rest = &characters[at..];
        let after_word = at > 0 && is_word(characters[at - 1]);
        let length = literal_or_comment(rest, after_word);
        if length == 0 {
            code.push(rest[0]);
            at += 1;
        } else {
            code.extend(rest[..length].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at += length;
        }
    }
    code
}

/// Whether `word` occurs in `line` with no letter, digit or underscore on either side.
pub(crate) fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !is_word(c)).any(|found| found == word)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// How many characters at the start of `rest` are one comment or literal; 0 for code.
fn literal_or_comment(rest: &[char], after_word: bool) -> usize {
    match rest {
        ['/', '/', ..] => rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
        ['/', '*', ..] => block_comment(rest),
        ['"', ..] => quoted(rest),
        ['\'', ..] => character(rest),
        ['r' | 'b' | 'c', ..] if !after_word => prefixed_string(rest),
        _ => 0,
    }
}

fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        match rest[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// A literal between two of its first character, with backslash escapes.
fn quoted(rest: &[char]) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != rest[0] {
        at += if rest[at] == '\\' { 2 } else { 1 };
    }
    rest.len().min(at + 1)
}

/// A character literal; a lifetime or label is code.
fn character(rest: &[char]) -> usize {
    match rest {
        ['\'', '\\', ..] => quoted(rest),
        ['\'', _, '\'', ..] => 3,
        _ => 0,
    }
}

/// `r"…"`, `r#"…"#`, `b"…"`, `br#"…"#`, `c"…"`, `b'…'`; anything else that begins so is code.
fn prefixed_string(rest: &[char]) -> usize {
    let letters = rest.iter().take_while(|c| matches!(c, 'r' | 'b' | 'c')).count();
    let raw = rest[..letters].contains(&'r');
    let body = &rest[letters..];
    match body {
        ['"', ..] if !raw => letters + quoted(body),
        ['\'', ..] if rest[..letters] == ['b'] => letters + character(body),
        ['"' | '#', ..] if raw => raw_string(body).map_or(0, |length| letters + length),
        _ => 0,
    }
}

/// The length of `#…#"…"#…#`, or nothing for a raw identifier.
fn raw_string(body: &[char]) -> Option<usize> {
    let hashes = body.iter().take_while(|&&c| c == '#').count();
    if body.get(hashes) != Some(&'"') {
        return None;
    }
    let ends = |at: usize| {
        body[at] == '"' && body[at + 1..].iter().take_while(|&&c| c == '#').count() >= hashes
    };
    let end = (hashes + 1..body.len()).find(|&at| ends(at));
    Some(end.map_or(body.len(), |at| at + 1 + hashes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_left() {
        for (source, expected) in [
            ("a // unsafe\nb", "a          \nb"),
            ("a /* x /* y */ z */ b", "a                   b"),
            (r#"f("a \" b", c)"#, "f(        , c)"),
            (r##"f(r#"a " b"#, c)"##, "f(          , c)"),
            ("b\"x\" br\"\\\" c\"y\";", "               ;"),
            ("'a' '\\'' b'\"' 'x: &'a str", "              'x: &'a str"),
            ("r#type bar\"s\"", "r#type bar   "),
            ("\"open", "     "),
        ] {
            assert_eq!(code_of(source), expected, "{source}");
        }
    }

    #[test]
    fn words_end_where_words_end() {
        assert!(has_word("x = unsafe{", "unsafe"));
        assert!(!has_word("#![expect(unsafe_code)]", "unsafe"));
    }
}
