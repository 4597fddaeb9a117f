//! Printable text of tokens: each token's part of the text, without characters that are invisible, move the cursor or
//! change the writing direction.

/// Returns the printable text of each token, from its bytes. A character that is split over several tokens is shown
/// with the token that begins it. Bytes that are not UTF-8, characters without a glyph, and those that control the
/// layout become escapes. Newlines and tabs stay.
pub fn shown(pieces: &[Vec<u8>]) -> Vec<String> {
    let mut texts = vec![String::new(); pieces.len()];
    // index of the token of each byte
    let owners: Vec<usize> = pieces.iter().enumerate().flat_map(|(i, piece)| piece.iter().map(move |_| i)).collect();
    let bytes = pieces.concat();
    let mut at = 0;
    for chunk in bytes.utf8_chunks() {
        for (offset, c) in chunk.valid().char_indices() {
            push(&mut texts[owners[at + offset]], c);
        }
        at += chunk.valid().len();
        for byte in chunk.invalid() {
            texts[owners[at]] += &format!("\\x{byte:02x}");
            at += 1;
        }
    }
    texts
}

fn push(text: &mut String, c: char) {
    match c {
        '\n' | '\t' => text.push(c),
        // control pictures: U+2400 and following
        '\0'..='\x1f' => text.extend(char::from_u32(0x2400 + c as u32)),
        '\x7f' => text.push('\u{2421}'),
        c if steers(c) => text.extend(c.escape_unicode()),
        c => text.push(c),
    }
}

/// Unicode controls and format characters (categories Cc, Cf, Zl, Zp), except the joiners, which shape Persian words
/// and emoji.
fn steers(c: char) -> bool {
    matches!(c,
        '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}' | '\u{200b}'
        | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pieces: &[&[u8]]) -> Vec<String> {
        shown(&pieces.iter().map(|piece| piece.to_vec()).collect::<Vec<_>>())
    }

    #[test]
    fn a_split_character_is_shown_where_it_begins() {
        // é and an emoji of four bytes, over three tokens
        assert_eq!(of(&[b"caf\xc3", b"\xa9 \xf0\x9f", b"\xa6", b"\x9c!"]), ["café", " 🦜", "", "!"]);
    }

    #[test]
    fn bytes_that_are_no_text_become_escapes() {
        assert_eq!(of(&[b"a\xff", b"\xc3", b"b", b"\xf0\x9f"]), ["a\\xff", "\\xc3", "b", "\\xf0\\x9f"]);
    }

    #[test]
    fn what_is_invisible_or_turns_the_text_becomes_visible() {
        assert_eq!(of(&[b"\x1b[2J\0\x7f\r\n\tx"]), ["␛[2J␀␡␍\n\tx"]);
        assert_eq!(
            of(&["a\u{202e}b\u{2066}\u{feff}\u{85}\u{2028}".as_bytes()]),
            ["a\\u{202e}b\\u{2066}\\u{feff}\\u{85}\\u{2028}"]
        );
        assert_eq!(of(&["שלום مرحبا 👩\u{200d}🚀".as_bytes()]), ["שלום مرحبا 👩\u{200d}🚀"]);
    }
}
