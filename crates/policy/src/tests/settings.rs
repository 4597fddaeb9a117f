//! Settings: bounds, messages, names.

use serde::Deserialize;
use serde::de::value::{Error, StrDeserializer};

use super::*;

#[test]
fn a_rejected_setting_names_its_flag() {
    let good = Params::default;
    let capped = Params { max_cells: Some(68), ..good() };
    let crossed = Params { max_cells: Some(200), min_cells: 201, ..good() };
    let full = Params { max_cells: Some(200), ..Params::new(Kind::Full) };
    let full_share = Params { ratio: Some(0.5), ..Params::new(Kind::Full) };
    let unseen = Params { recent: 0, ..Params::new(Kind::GvotePaper) };
    for (params, flag) in [
        (Params { target_kl: Some(0.0), ..good() }, "`target_kl`"),
        (Params { target_kl: Some(f32::NAN), ..good() }, "`target_kl`"),
        (Params { draft: 0, ..good() }, "`draft`"),
        (Params { draft: 257, ..good() }, "`draft`"),
        (Params { lost_mass: 0.0, ..good() }, "`lost_mass`"),
        (Params { lost_mass: 1.0, ..good() }, "`lost_mass`"),
        (Params { lost_mass: f32::NAN, ..good() }, "`lost_mass`"),
        (Params { p_nuc: 0.0, ..good() }, "`p_nuc`"),
        (Params { p_nuc: 1.1, ..good() }, "`p_nuc`"),
        (Params { samples: 0, ..good() }, "`samples`"),
        (Params { samples: 257, ..good() }, "`samples`"),
        (Params { window: 0, ..good() }, "`window`"),
        (Params { window: 1025, recent: 2048, ..good() }, "`window`"),
        (Params { window: 1 << 30, ..Params::new(Kind::Full) }, "`window`"),
        (Params { span: Span { back: 2, forward: 9999 }, ..good() }, "`span`"),
        (Params { sinks: usize::MAX, ..good() }, "`sinks`"),
        (Params { recent: i32::MAX as usize, ..good() }, "`recent`"),
        (Params { recent: 63, ..good() }, "`recent`"),
        (Params { pool: 4, ..good() }, "pool"),
        (Params { head_mix: -1.0, ..good() }, "head mix"),
        (Params { replay: true, ..Params::new(Kind::SnapKv) }, "`replay`"),
        (unseen, "`recent`"),
        (capped, "`max_cells`"),
        (crossed, "`min_cells`"),
        (full, "`max_cells`"),
        (full_share, "`ratio`"),
        (Params { evict: Evict::Cells, ..Params::new(Kind::AdaKv) }, "`evict`"),
        (Params { exact: true, ..good() }, "exact"),
        (Params { exact: true, min_cells: 1, ..Params::new(Kind::GvotePaper) }, "exact"),
        (Params { exact: true, evict: Evict::Cells, ..Params::new(Kind::GvotePaper) }, "`evict`"),
        (Params { ratio: Some(0.0), ..good() }, "`ratio`"),
        (Params { ratio: Some(1.5), ..good() }, "`ratio`"),
    ] {
        let error = params.validate().expect_err(flag).to_string();
        assert!(error.starts_with(flag) || error.starts_with(&format!("the {flag}")), "{error}");
        assert!(build(&params, shape(1000)).is_err(), "{error}");
    }
    for kind in Kind::ALL {
        assert_eq!(Params::new(*kind).validate(), Ok(()));
    }
    for p_nuc in [1.0, f32::MIN_POSITIVE] {
        assert_eq!(Params { p_nuc, recent: 1, ..Params::new(Kind::GvotePaper) }.validate(), Ok(()));
    }
}

#[test]
fn names_are_read_back() {
    for &kind in Kind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
        assert_eq!(Kind::deserialize(StrDeserializer::<Error>::new(kind.name())), Ok(kind));
    }
    for &preset in Preset::ALL {
        assert_eq!(preset.name().parse(), Ok(preset));
    }
    for &evict in Evict::ALL {
        assert_eq!(evict.name().parse(), Ok(evict));
        assert_eq!(Evict::deserialize(StrDeserializer::<Error>::new(evict.name())), Ok(evict));
    }
    let span = Span { back: 2, forward: 32 };
    assert_eq!(span.to_string().parse(), Ok(span));
    assert_eq!("0".parse(), Ok(Span::NONE));
    for text in ["", "3", "1,2,3", "-1,2", "a,b"] {
        assert!(text.parse::<Span>().is_err(), "{text:?}");
    }
    assert!("gvotes".parse::<Kind>().unwrap_err().to_string().contains("gvote-paper"));
}
