// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"encoding/json"
	"slices"

	"github.com/baton-epp/baton/inference"
)

// embeddingField is where vLLM reads and writes handles on embeddings.
const embeddingField = "ec_transfer_params"

// maxEmbeddings bounds the handles in one body, in sum; items beyond stay raw media.
const maxEmbeddings = 1 << 20

// ecNixl is encoder disaggregation with handles (vLLM's CPU connector in NIXL mode): an encode endpoint answers with
// ec_transfer_params, a map from the item's hash to where its embedding waits, and the endpoint that uses it gets all of
// these maps in one.
//
// The hash must be the same at every endpoint. Each engine would make it of the pixels, but takes a part's uuid instead
// when there is one: so every part that is encoded gets [Encoding].Keys as its uuid, in the encode leg and in every
// further leg, whether that uses the embedding or only counts placeholders. A uuid that the client sent stays as it is.
//
// With [Encoding].Lean a part gives way to an embedding's metadata where the encode endpoint told it; the raw media is then
// gone, and an engine that cannot fetch the embedding has nothing to compute it from.
type ecNixl struct{}

func (ecNixl) Item(x *Encoding, item int) (inference.Body, bool) {
	frame, ok := partFrame(x.Request, item)
	if !ok || x.Request.API != inference.Chat {
		return inference.Body{}, false
	}
	part := x.Request.Body.Slice(x.Request.Media[item].Part)
	if sentUUID(frame) != nil {
		return encodeBody(x, part), true
	}
	var named inference.Body
	named.Append([]byte(`{"uuid":"` + x.Keys[item] + `",`))
	join(&named, part.Slice(inference.Span{Start: 1, End: part.Len}))
	return encodeBody(x, named), true
}

// sentUUID returns the uuid in a content part, raw; nil without one.
func sentUUID(frame inference.Body) []byte {
	if s, ok := frame.Member(inference.Span{End: frame.Len}, "uuid"); ok {
		return bytes.Join(frame.Slice(s).Chunks, nil)
	}
	return nil
}

// Answer takes the handle as it is: an object of objects, by hash.
func (ecNixl) Answer(_ *Encoding, _ int, answer []byte) Answer {
	r, settled := read(answer)
	if settled {
		return r.Answer
	}
	raw := memberOf(r.object, embeddingField)
	switch {
	case !isThere(raw):
		r.Verdict = Missing
	case !isHandle(raw):
		r.Verdict = Incomplete
	default:
		r.Handle = slices.Clone(raw)
	}
	return r.Answer
}

func isHandle(raw []byte) bool {
	if raw[0] != '{' || len(raw) > maxEmbeddings || !json.Valid(raw) {
		return false
	}
	entries := 0
	for _, entry := range pairs(raw) {
		if raw[entry.Start] != '{' {
			return false
		}
		entries++
	}
	return entries > 0
}

func (ecNixl) Splice(x *Encoding, handles [][]byte, consumer bool, body *inference.Edits) {
	body.KeepSpans()
	body.Remove(embeddingField)
	merged := merger{out: []byte("{"), seen: map[string]bool{}}
	uuids := map[string]string{} // by key: what the first item of that content has
	for i, handle := range handles[:min(len(handles), len(x.Request.Media))] {
		frame, ok := partFrame(x.Request, i)
		if handle == nil || !ok || !merged.add(handle) {
			continue
		}
		part, uuid := x.Request.Media[i].Part, sentUUID(frame)
		first, another := uuids[x.Keys[i]]
		if !another {
			first = string(uuid)
			uuids[x.Keys[i]] = first
		}
		// Items of one content are encoded once, under the uuid of the first: one that the client named otherwise would
		// not be found.
		if x.Lean && first == string(uuid) {
			if embeds := embedsPart(x.Request.Media[i].Kind, handle, uuid, x.Keys[i]); embeds != nil {
				body.ReplaceSpan(part, embeds)
				continue
			}
		}
		if uuid == nil {
			body.AddMember(part, "uuid", []byte(`"`+x.Keys[i]+`"`))
		}
	}
	if consumer && len(merged.out) > 1 {
		body.Set(embeddingField, append(merged.out, '}'))
	}
}

// A merger makes one object out of handles, each hash once.
type merger struct {
	out  []byte
	seen map[string]bool
}

// add copies the entries of handle that are new. False: there is no room for them, and nothing was added.
func (m *merger) add(handle []byte) bool {
	if len(m.out)+len(handle)+1 > maxEmbeddings {
		return false
	}
	entries := map[string]inference.Span{} // of duplicates the last one, as engines read them
	var hashes []string
	for key, entry := range pairs(handle) {
		var hash string
		if json.Unmarshal(handle[key.Start:key.End], &hash) != nil {
			continue // not in a handle that Answer returned
		}
		if _, ok := entries[hash]; !ok {
			hashes = append(hashes, hash)
		}
		entries[hash] = inference.Span{Start: key.Start, End: entry.End}
	}
	for _, hash := range hashes {
		if m.seen[hash] {
			continue
		}
		m.seen[hash] = true
		if len(m.out) > 1 {
			m.out = append(m.out, ',')
		}
		m.out = append(m.out, handle[entries[hash].Start:entries[hash].End]...)
	}
	return true
}

// embedsPart returns the content part that stands for an embedding, nil when the handle does not say enough.
func embedsPart(kind string, handle, uuid []byte, key string) []byte {
	var metadata []byte
	entries := 0
	for _, entry := range pairs(handle) {
		metadata = memberOf(handle[entry.Start:entry.End], "metadata")
		entries++
	}
	if uuid != nil && !isText(string(uuid)) { // null or no name: the engine would hash the media, which would be gone
		return nil
	}
	if entries != 1 || len(metadata) == 0 || metadata[0] != '{' || len(bytes.TrimSpace(metadata[1:])) == 1 {
		return nil
	}
	name := map[string]string{
		inference.ImageURL: "image_embeds", inference.VideoURL: "video_embeds",
		inference.AudioURL: "audio_embeds", inference.InputAudio: "audio_embeds",
	}[kind]
	if uuid == nil {
		uuid = []byte(`"` + key + `"`)
	}
	part := append([]byte(`{"type":"`+name+`","`+name+`":`), metadata...)
	return append(append(append(part, `,"uuid":`...), uuid...), '}')
}
