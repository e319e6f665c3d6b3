// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"

	"github.com/goccy/go-yaml/token"
)

// refuseSlow keeps from the tokenizer what it takes minutes for.
func (b *builder) refuseSlow(data []byte) {
	line, blank := 1, 0
	for text := range bytes.Lines(data) {
		if len(text) > maxLine {
			b.add(line, "", "the line has %d bytes, at most %d are allowed", len(text), maxLine)
			return
		}
		if bytes.IndexByte(bytes.TrimSuffix(text, []byte("\r\n")), '\r') >= 0 {
			b.add(line, "", "a carriage return inside the line")
			return
		}
		if blank++; len(bytes.TrimSpace(text)) > 0 {
			blank = 0
		}
		if blank > maxBlank {
			b.add(line, "", "more than %d empty lines", maxBlank)
			return
		}
		line++
	}
}

// refuseDeep keeps from the parser what would make it recurse without bound or compare every key with every other.
func (b *builder) refuseDeep(tokens token.Tokens) {
	flow, entries, marks, line := 0, 0, 0, 0
	var keys, items [maxIndent + 2]int // per indentation, since something stood further left
	for _, t := range tokens {
		if t.Position.IndentNum > maxIndent {
			b.add(t.Position.Line, "", "indented by more than %d columns", maxIndent)
			return
		}
		if t.Position.Line != line {
			line, entries = t.Position.Line, 0
			clear(keys[t.Position.IndentNum+1:])
			clear(items[t.Position.IndentNum+1:])
		}
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType:
			entries++
			items[t.Position.IndentNum]++
			clear(keys[t.Position.IndentNum:])
		case token.CollectEntryType:
			items[t.Position.IndentNum]++
		case token.MappingValueType:
			keys[t.Position.IndentNum]++
		case token.MappingKeyType, token.TagType, token.AnchorType, token.AliasType, token.DirectiveType:
			marks++
		default:
		}
		if flow > maxDepth || entries > maxDepth || marks > maxMarks {
			b.add(line, "", "nested too deeply, or too many tags, anchors or aliases")
			return
		}
		if keys[t.Position.IndentNum] > maxKeys || items[t.Position.IndentNum] > maxItems {
			b.add(line, "", "more than %d keys in one mapping, or %d items in one list", maxKeys, maxItems)
			return
		}
	}
}
