// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"cmp"
	"slices"
)

func (x *expecter) prompt(api API) {
	prompts := 0
	for i, key := range x.root.keys {
		if !x.root.counts(i) {
			continue
		}
		v := x.root.vals[i]
		switch api {
		case Chat, Messages, Responses:
			switch {
			case key == "tools":
				x.raw(v)
			case key == "messages" && api != Responses, key == "system" && api == Messages,
				(key == "instructions" || key == "input") && api == Responses:
				x.text(v)
			}
		case Completions:
			switch key {
			case "prompt":
				prompts += x.batch(v)
			case "prompt_embeds":
				prompts += embeds(v)
			}
		case Embeddings:
			switch key {
			case "input":
				prompts += x.batch(v)
			case "messages":
				x.text(v)
			}
		case Generate:
			if key == "token_ids" {
				prompts += x.batch(v)
			}
		case Unknown:
		case SGLangGenerate:
			if key == "text" || key == "input_ids" {
				prompts += x.batch(v)
			}
			if kind := map[string]string{"image_data": ImageURL, "audio_data": AudioURL, "video_data": VideoURL}[key]; kind != "" {
				x.media(kind, v, Span{})
			}
		}
	}
	x.Prompts = max(1, prompts)
	slices.SortFunc(x.Media, func(a, b Media) int { return cmp.Compare(a.Span.Start, b.Span.Start) })
}

// embeds counts prompts that are not looked into.
func embeds(v *node) int {
	if v.kind == 'n' {
		return 0
	}
	if v.kind != '[' {
		return 1
	}
	return len(v.vals)
}

func (x *expecter) batch(v *node) int {
	if v.kind == 'n' {
		return 0
	}
	if v.kind != '[' {
		x.text(v)
		return 1
	}
	numbers, others := 0, 0
	for _, e := range v.vals {
		switch e.kind {
		case '0':
			numbers++
		case '[':
			others++
			x.TokenIDs += len(e.vals)
			if len(e.vals) > 0 {
				x.add(Span{e.start, e.end})
			}
		default:
			others++
			x.text(e)
		}
	}
	if others == 0 && numbers > 0 {
		x.TokenIDs += numbers
		x.add(Span{v.start, v.end})
		return 1
	}
	return others
}

func (x *expecter) add(s Span) {
	if s.Len() > 0 {
		x.Text = append(x.Text, s)
	}
}

func (x *expecter) raw(v *node) {
	switch v.kind {
	case 'n':
	case '"':
		x.add(Span{v.start + 1, v.end - 1})
	default:
		x.add(Span{v.start, v.end})
	}
}

func (x *expecter) text(v *node) {
	switch v.kind {
	case '"':
		x.add(Span{v.start + 1, v.end - 1})
	case '[':
		for _, e := range v.vals {
			x.text(e)
		}
	case '{':
		for i, key := range v.keys {
			if v.counts(i) {
				x.part(v, key, v.vals[i])
			}
		}
	}
}

func (x *expecter) part(around *node, key string, v *node) {
	switch key {
	case "role", "content", "text", "name", "arguments", "output", "reasoning", "reasoning_content", "refusal", "thinking":
		x.text(v)
	case "input", "tool_calls":
		x.raw(v)
	case "image_url", "audio_url", "video_url", "input_audio":
		x.media(key, v, Span{around.start, around.end})
	case "source":
		if kind := around.get("type"); v.kind == '{' && kind != nil && kind.kind == '"' && kind.text == "image" {
			x.media(ImageURL, v, Span{around.start, around.end})
		}
	}
}

func (x *expecter) media(kind string, v *node, part Span) {
	switch {
	case v.kind == '[':
		for _, e := range v.vals {
			x.media(kind, e, part)
		}
	case v.kind == '{' || v.kind == '"' && v.end-v.start > 2:
		x.Media = append(x.Media, Media{Kind: kind, Span: Span{v.start, v.end}, Part: part})
	}
}
