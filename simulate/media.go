// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
)

// mediaTokens is how many placeholder tokens an image or another media item takes.
const mediaTokens = 64

// mediaItem is one image, audio or video of a prompt.
type mediaItem struct {
	kind   string // image, audio or video
	key    string // the mm hash: the part's uuid, or the hash of its content
	offset int    // of its first placeholder token
	raw    bool   // the body has the media itself; otherwise only what an encoder said about it
}

// readMedia reads a content part that is a media item; ok is false for every other part. An embeddings part is one whose
// media was encoded elsewhere: its value is the metadata of the encoder's answer.
func readMedia(v json.RawMessage) (m mediaItem, ok bool) {
	var part map[string]json.RawMessage
	if json.Unmarshal(v, &part) != nil {
		return m, false
	}
	name := unquote(part["type"])
	field := name
	switch name {
	case "image_url", "audio_url", "video_url", "input_audio":
	case "input_image":
		field = "image_url"
	case "image": // Anthropic's
		field = "source"
	case "image_embeds", "audio_embeds", "video_embeds":
	default:
		return m, false
	}
	m.raw = !strings.HasSuffix(name, "_embeds")
	m.kind = strings.TrimPrefix(name, "input_")
	m.kind, _, _ = strings.Cut(m.kind, "_")
	m.key = unquote(part["uuid"])
	switch {
	case m.key == "":
		m.key = contentHash(mediaContent(part[field]))
	case len(m.key) > maxKey:
		m.key = contentHash(m.key)
	}
	return m, true
}

// maxKey bounds the keys that engines keep.
const maxKey = 256

func contentHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// mediaContent is what of a part's value is the media itself: an engine hashes what it decoded, not how it was written.
func mediaContent(v json.RawMessage) string {
	var named struct {
		URL  string `json:"url"`
		Data string `json:"data"`
	}
	switch {
	case json.Unmarshal(v, &named) == nil && named.URL+named.Data != "":
		return named.URL + named.Data
	case len(v) > 0 && v[0] == '"':
		return unquote(v)
	}
	var b bytes.Buffer
	if json.Compact(&b, v) != nil {
		return string(v)
	}
	return b.String()
}

func unquote(v json.RawMessage) string {
	var s string
	if len(v) == 0 || json.Unmarshal(v, &s) != nil {
		return ""
	}
	return s
}

// placeholders puts an item's placeholders into the prompt. They differ by the item's key, and so do the prefix hashes.
func (b *promptBuilder) placeholders(m mediaItem) {
	m.offset = len(b.tokens)
	b.media = append(b.media, m)
	b.fill("media" + m.key)
}

// fill is what an unknown part takes, too.
func (b *promptBuilder) fill(name string) {
	id := pieceID(name)
	for range mediaTokens {
		b.tokens = append(b.tokens, id)
	}
}
