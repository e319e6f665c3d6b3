// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/baton-epp/baton/config"
)

// entry is one element of the file's list `endpoints` (llm-d-router v0.10; ports is ours).
type entry struct {
	Name      string            `yaml:"name"`      // required
	Namespace string            `yaml:"namespace"` // default "default"
	Address   string            `yaml:"address"`   // IPv4 or IPv6, required
	Port      any               `yaml:"port"`      // text or number
	Ports     []any             `yaml:"ports"`     // instead of port: one endpoint per port, rank = position
	Labels    map[string]string `yaml:"labels"`
}

// entries collects the endpoints of one file.
type entries struct {
	wanted []Wanted
	names  map[string]bool
	addrs  map[netip.AddrPort]bool
}

// parseFile reads the list. bad are entries that cannot be used, each with file, line and path; err means that there
// is no list at all. An empty list is a list, an empty file is not: a writer may have been interrupted.
func parseFile(file string, data []byte) (wanted []Wanted, bad []error, err error) {
	p, err := config.Parse(file, data)
	if err != nil {
		return nil, nil, err
	}
	var doc struct {
		Endpoints *[]config.Parameters `yaml:"endpoints"`
	}
	if err := p.Decode(&doc); err != nil {
		return nil, nil, err
	}
	if doc.Endpoints == nil {
		return nil, nil, p.Errorf("endpoints", "is required; an empty pool is written as endpoints: []")
	}
	list := entries{names: map[string]bool{}, addrs: map[netip.AddrPort]bool{}}
	for _, raw := range *doc.Endpoints {
		if err := list.add(raw); err != nil {
			bad = append(bad, err)
		}
	}
	return list.wanted, bad, nil
}

// add takes one entry whole or not at all.
func (l *entries) add(raw config.Parameters) error {
	e := entry{Namespace: "default"}
	if err := raw.Decode(&e); err != nil {
		return err
	}
	for path, value := range map[string]string{"name": e.Name, "namespace": e.Namespace} {
		if value == "" || strings.ContainsAny(value, "/ \t\r\n") {
			return raw.Errorf(path, "%q, must be a name without blanks and slashes", value)
		}
	}
	if l.names[e.Namespace+"/"+e.Name] {
		return raw.Errorf("name", "%s/%s is there already", e.Namespace, e.Name)
	}
	addr, err := parseAddr(e.Address)
	if err != nil {
		return raw.Errorf("address", "%v", err)
	}
	ports, path := e.Ports, "ports"
	if e.Port != nil || len(ports) == 0 {
		if len(ports) > 0 {
			return raw.Errorf("port", "give either port or ports")
		}
		ports, path = []any{e.Port}, "port"
	}
	wanted := make([]Wanted, 0, len(ports))
	for rank, value := range ports {
		at := path
		if path == "ports" {
			at = fmt.Sprintf("ports[%d]", rank)
		}
		port, err := strconv.ParseUint(fmt.Sprint(value), 10, 16)
		if err != nil || port == 0 {
			return raw.Errorf(at, "%v, must be a port from 1 to 65535", value)
		}
		ap := netip.AddrPortFrom(addr, uint16(port))
		if l.addrs[ap] {
			return raw.Errorf(at, "%s is there already", ap)
		}
		l.addrs[ap] = true
		wanted = append(wanted, Wanted{
			Namespace: e.Namespace,
			Name:      e.Name,
			UID:       e.Namespace + "/" + e.Name + "@" + addr.String(),
			Addr:      ap,
			Rank:      rank,
			Labels:    e.Labels,
		})
	}
	l.names[e.Namespace+"/"+e.Name] = true
	l.wanted = append(l.wanted, wanted...)
	return nil
}

// parseAddr reads an address that can be dialled; IPv6 may stand in brackets, IPv4 in IPv6 becomes IPv4.
func parseAddr(s string) (netip.Addr, error) {
	bare := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		bare = s[1 : len(s)-1]
	}
	addr, err := netip.ParseAddr(bare)
	if err != nil || addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("%q, must be an IPv4 or IPv6 address", s)
	}
	return addr.Unmap(), nil
}
