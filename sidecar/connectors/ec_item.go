// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"

	"github.com/baton-epp/baton/inference"
)

// MediaKey identifies an item of r.Media by content, for [Encoding].Keys: the SHA-256, in hexadecimal, of its kind, a zero
// byte and the raw JSON value at Media.Span. The kind is in it since an image and a video may have the same URL, and
// engines that are given one key for both would take one for the other. Nothing is copied.
func MediaKey(r *inference.Request, item int) string {
	m := r.Media[item]
	h := sha256.New()
	_, _ = h.Write(append([]byte(m.Kind), 0))
	for _, chunk := range r.Body.Slice(m.Span).Chunks {
		_, _ = h.Write(chunk)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// asSent are the fields that change what an encoder makes of an item, or when; encode legs carry them as the client sent
// them.
var asSent = []string{"mm_processor_kwargs", "media_io_kwargs", "priority", "session_id"}

// encodeBody returns a chat request for nothing but one item, given as content part.
func encodeBody(x *Encoding, part inference.Body) inference.Body {
	var b inference.Body
	b.Append([]byte("{"))
	if x.Model != "" {
		name, _ := json.Marshal(x.Model) // never fails for a string
		b.Append(append(append([]byte(`"model":`), name...), ','))
	} else if model, ok := x.Request.Field("model"); ok {
		b.Append([]byte(`"model":`))
		join(&b, x.Request.Body.Slice(model))
		b.Append([]byte(","))
	}
	b.Append([]byte(`"messages":[{"role":"user","content":[`))
	join(&b, part)
	b.Append([]byte(`]}],"max_tokens":1,"stream":false`))
	for _, name := range asSent {
		if value, ok := x.Request.Field(name); ok {
			b.Append([]byte(`,"` + name + `":`))
			join(&b, x.Request.Body.Slice(value))
		}
	}
	b.Append([]byte("}"))
	return b
}

func join(b *inference.Body, more inference.Body) {
	for _, chunk := range more.Chunks {
		b.Append(chunk)
	}
}

// contentPart returns an item as part of a chat message: as it is in a chat request, otherwise made around the URL or the
// data where that is. False: it is not a part of its own, or of a kind that chat does not know.
func contentPart(r *inference.Request, item int) (part inference.Body, ok bool) {
	m := r.Media[item]
	switch r.API {
	case inference.Chat:
		if _, ok := partFrame(r, item); ok {
			return r.Body.Slice(m.Part), true
		}
	case inference.Responses:
		return responsesPart(r, m)
	case inference.Messages:
		return messagesPart(r, m)
	default:
	}
	return part, false
}

// responsesPart makes a chat part from input_image, whose image_url is a string, or from input_audio, which is the same.
func responsesPart(r *inference.Request, m inference.Media) (part inference.Body, ok bool) {
	value := r.Body.Slice(m.Span)
	switch isString := value.Chunks[0][0] == '"'; {
	case m.Kind == inference.ImageURL && isString:
		part.Append([]byte(`{"type":"image_url","image_url":{"url":`))
		join(&part, value)
		part.Append([]byte("}}"))
	case m.Kind == inference.InputAudio && !isString:
		part.Append([]byte(`{"type":"input_audio","input_audio":`))
		join(&part, value)
		part.Append([]byte("}"))
	default:
		return part, false
	}
	return part, true
}

// messagesPart makes a chat part from the source of an image, as vLLM does (vllm/entrypoints/anthropic): a URL as it is,
// data in a data: URL.
func messagesPart(r *inference.Request, m inference.Media) (part inference.Body, ok bool) {
	kind, _ := r.Body.Member(m.Span, "type")
	part.Append([]byte(`{"type":"image_url","image_url":{"url":`))
	switch string(bytes.Join(r.Body.Slice(kind).Chunks, nil)) {
	case `"url"`:
		url, isString := stringMember(r, m.Span, "url")
		if !isString {
			return part, false
		}
		join(&part, r.Body.Slice(url))
	case `"base64"`:
		mediaType, isString := stringMember(r, m.Span, "media_type")
		data, isToo := stringMember(r, m.Span, "data")
		if !isString || !isToo {
			return part, false
		}
		part.Append([]byte(`"data:`))
		join(&part, r.Body.Slice(inference.Span{Start: mediaType.Start + 1, End: mediaType.End - 1}))
		part.Append([]byte(";base64,"))
		join(&part, r.Body.Slice(inference.Span{Start: data.Start + 1, End: data.End}))
	default:
		return part, false
	}
	part.Append([]byte("}}"))
	return part, true
}

func stringMember(r *inference.Request, object inference.Span, name string) (inference.Span, bool) {
	s, ok := r.Body.Member(object, name)
	return s, ok && r.Body.Slice(s).Chunks[0][0] == '"'
}

// partFrame returns an item's content part with a 0 in place of the URL or the data, which can be large. False: the part
// holds more than this item, or is a whole message.
func partFrame(r *inference.Request, item int) (frame inference.Body, ok bool) {
	m := r.Media[item]
	if m.Part.Len() <= 0 || item > 0 && r.Media[item-1].Span.Start > m.Part.Start ||
		item+1 < len(r.Media) && r.Media[item+1].Span.Start < m.Part.End {
		return frame, false
	}
	join(&frame, r.Body.Slice(inference.Span{Start: m.Part.Start, End: m.Span.Start}))
	frame.Append([]byte("0"))
	join(&frame, r.Body.Slice(inference.Span{Start: m.Span.End, End: m.Part.End}))
	_, isMessage := frame.Member(inference.Span{End: frame.Len}, "role")
	return frame, !isMessage
}
