// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"cmp"
	"slices"
)

const (
	maxTexts = 16 << 10 // after that many, the last span grows over what follows
	maxMedia = 4 << 10  // items beyond are not listed
)

// read reads a value as prompt. Only batches count prompts.
func (p *parser) read(how reading, b *batch) {
	switch how {
	case asText:
		p.text()
	case asWhole:
		if t := p.value(); t.kind != 'n' {
			p.addText(t.Span)
		}
	case asBatch, asCount:
		p.batch(b, how == asBatch)
	case asImage:
		p.media(ImageURL)
	case asAudio:
		p.media(AudioURL)
	case asVideo:
		p.media(VideoURL)
	case asInputAudio:
		p.media(InputAudio)
	case skipped:
		p.value()
	}
}

// text reads prompt text in any shape.
func (p *parser) text() {
	switch p.peek() {
	case '{':
		p.part()
	case '[':
		p.list(p.text)
	default:
		if t := p.value(); t.kind == '"' {
			p.addText(t.Span)
		}
	}
}

// part reads a message or a part of one.
func (p *parser) part() {
	var seen [partSlots]Span
	var kind, source token
	start := p.offset()
	p.enter()
	for o := (object{}); p.member(&o); {
		k := partKeys[string(p.content(o.key))]
		if k.slot > 0 && seen[k.slot].End > 0 {
			p.forget(seen[k.slot])
		}
		from := p.offset()
		switch k.slot {
		case typeSlot:
			kind = p.value()
		case sourceSlot:
			source = p.value()
		default:
			p.read(k.how, nil)
		}
		seen[k.slot] = Span{from, p.offset()}
	}
	if source.kind == '{' && p.says(kind, "image") {
		p.addMedia(ImageURL, source.Span)
	}
	p.closePart(Span{start, p.offset()})
}

// says reports whether t is the string want.
func (p *parser) says(t token, want string) bool {
	return t.kind == '"' && string(p.content(t)) == want
}

// batch reads prompts and counts them: a string, token ids, or a list of either.
func (p *parser) batch(b *batch, looked bool) {
	switch {
	case p.peek() == '[':
		p.promptList(b, looked)
	case p.peek() == 'n' || !looked:
		if t := p.value(); t.kind != 'n' {
			b.prompts = 1
		}
	default:
		b.prompts = 1
		p.text()
	}
}

// promptList reads a list of prompts or of token ids.
func (p *parser) promptList(b *batch, looked bool) {
	start, numbers := p.offset(), 0
	p.list(func() {
		if looked {
			numbers += p.naturals()
			p.space()
		}
		switch c := p.peek(); {
		case !looked:
			b.prompts++
			p.value()
		case c == '-' || '0' <= c && c <= '9':
			if t := p.value(); t.kind == '0' {
				numbers++
			} else {
				b.prompts++ // -Infinity
			}
		case c == '[':
			b.prompts++
			start, before := p.offset(), b.tokenIDs
			p.list(func() {
				b.tokenIDs += 1 + p.naturals()
				p.value()
			})
			if b.tokenIDs > before {
				p.addText(Span{start, p.offset()})
			}
		default:
			b.prompts++
			p.text()
		}
	})
	if numbers > 0 && b.prompts == 0 {
		b.prompts, b.tokenIDs = 1, numbers
		p.addText(Span{start, p.offset()})
	}
}

// media reads a value that holds a URL or data, or a list of such; null and the empty string hold none.
func (p *parser) media(kind string) {
	if p.peek() == '[' {
		p.list(func() { p.media(kind) })
		return
	}
	start := p.offset()
	if t := p.value(); t.kind == '{' || t.kind == '"' && t.Len() > 0 {
		p.addMedia(kind, Span{start, p.offset()})
	}
}

// addText adds a span of prompt text. Hostile bodies of very many short texts end in one span that grows over what
// lies between them: memory stays bounded, and equal beginnings still have equal spans.
func (p *parser) addText(s Span) {
	r := p.req
	switch n := len(r.Text); {
	case s.Len() <= 0:
	case n == maxTexts:
		r.Text[n-1].End = s.End
	default:
		r.Text = append(r.Text, s)
	}
}

// addMedia adds an item, in body order.
func (p *parser) addMedia(kind string, s Span) {
	r := p.req
	if len(r.Media) == maxMedia {
		return
	}
	i := len(r.Media)
	for i > 0 && r.Media[i-1].Span.Start > s.Start {
		i--
	}
	r.Media = slices.Insert(r.Media, i, Media{Kind: kind, Span: s})
}

// closePart notes where the part that just ended is, for the media in it and in no part within it.
func (p *parser) closePart(part Span) {
	media := p.req.Media
	for i := len(media) - 1; i >= 0 && media[i].Span.Start > part.Start; i-- {
		if media[i].Part.End == 0 {
			media[i].Part = part
		}
	}
}

// forget drops what was found in the value of a key that comes once more. Both lists are in body order, and what lies
// behind the value is mostly dropped with it, so that many duplicates cost little.
func (p *parser) forget(value Span) {
	r := p.req
	before := func(s Span, at int) int { return cmp.Compare(s.Start, at) }
	i, _ := slices.BinarySearchFunc(r.Text, value.Start, before)
	j, _ := slices.BinarySearchFunc(r.Text, value.End, before)
	r.Text = slices.Delete(r.Text, i, j)
	mediaBefore := func(m Media, at int) int { return cmp.Compare(m.Span.Start, at) }
	i, _ = slices.BinarySearchFunc(r.Media, value.Start, mediaBefore)
	j, _ = slices.BinarySearchFunc(r.Media, value.End, mediaBefore)
	r.Media = slices.Delete(r.Media, i, j)
}
