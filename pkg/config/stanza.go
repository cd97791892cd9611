package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/agnivade/levenshtein"
)

// rawStanza is the stanza as it is written, before any judgement.
type rawStanza struct {
	// What CNI itself puts into every stanza.
	CNIVersion       string          `json:"cniVersion"`
	CNIVersions      json.RawMessage `json:"cniVersions"`
	Name             string          `json:"name"`
	Type             string          `json:"type"`
	PrevResult       json.RawMessage `json:"prevResult"`
	RuntimeConfig    json.RawMessage `json:"runtimeConfig"`
	Capabilities     json.RawMessage `json:"capabilities"`
	Args             json.RawMessage `json:"args"`
	IPAM             json.RawMessage `json:"ipam"`
	DNS              json.RawMessage `json:"dns"`
	DisableCheck     json.RawMessage `json:"disableCheck"`
	DisableGC        json.RawMessage `json:"disableGC"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
	Attachments      json.RawMessage `json:"cni.dev/attachments"`

	// What is ours.
	ClusterCIDRs      []string     `json:"clusterCIDRs"`
	ExternalCIDRs     []string     `json:"externalCIDRs"`
	PeerCIDRs         []string     `json:"peerCIDRs"`
	PodCIDRs          []string     `json:"podCIDRs"`
	Subnets           []string     `json:"subnets"`
	Location          string       `json:"location"`
	Role              string       `json:"role"`
	Segments          []string     `json:"segments"`
	Encryption        string       `json:"encryption"`
	EncryptNodes      bool         `json:"encryptNodes"`
	DirectPorts       *[]int       `json:"directPorts"`
	NodeName          string       `json:"nodeName"`
	Endpoint          string       `json:"endpoint"`
	Interface         string       `json:"interface"`
	ListenPort        *int         `json:"listenPort"`
	RotationPort      *int         `json:"rotationPort"`
	KeyRotation       *string      `json:"keyRotation"`
	MTU               *int         `json:"mtu"`
	Keepalive         int          `json:"keepalive"`
	FwMark            *number      `json:"fwmark"`
	Table             *int         `json:"table"`
	RulePriority      *int         `json:"rulePriority"`
	Registry          *rawRegistry `json:"registry"`
	ClusterSecretFile string       `json:"clusterSecretFile"`
	Seal              string       `json:"seal"`
	RunDir            string       `json:"runDir"`
	StateDir          string       `json:"stateDir"`
}

type rawRegistry struct {
	Type string `json:"type"`

	// Of type file.
	Path string `json:"path"`

	// Of type etcd.
	Endpoints    []string `json:"endpoints"`
	Prefix       string   `json:"prefix"`
	CAFile       string   `json:"caFile"`
	CertFile     string   `json:"certFile"`
	KeyFile      string   `json:"keyFile"`
	Username     string   `json:"username"`
	PasswordFile string   `json:"passwordFile"`
}

// number is a JSON number, or a string such as "0x4".
type number string

func (n *number) UnmarshalJSON(b []byte) error {
	*n = number(strings.Trim(string(b), `"`))
	return nil
}

func decode(stanza []byte) (rawStanza, error) {
	var raw rawStanza
	if err := knownKeys("", stanza, reflect.TypeFor[rawStanza]()); err != nil {
		return raw, err
	}
	err := json.Unmarshal(stanza, &raw)
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return raw, &Error{wrong.Field, fmt.Sprintf("a JSON %s is not what belongs here", wrong.Value), "write " + describe(wrong.Type)}
	}
	if err != nil {
		return raw, fmt.Errorf("not valid JSON: %w", err)
	}
	return raw, nil
}

func describe(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Slice:
		return "a list"
	case reflect.Struct:
		return "an object"
	case reflect.Bool:
		return "true or false"
	case reflect.Int:
		return "a whole number"
	}
	return "a string"
}

// knownKeys refuses a key that no field has, and names the nearest that one does.
func knownKeys(path string, object []byte, t reflect.Type) error {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(object, &keys); err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) && path != "" {
			return &Error{strings.TrimSuffix(path, "."), fmt.Sprintf("a JSON %s is not what belongs here", wrong.Value), "write an object"}
		}
		return fmt.Errorf("not valid JSON: %w", err)
	}
	known := map[string]reflect.Type{}
	for i := range t.NumField() {
		known[t.Field(i).Tag.Get("json")] = t.Field(i).Type
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		field, ok := known[key]
		if !ok {
			return unknownKey(path, key, known)
		}
		nested := field.Kind() == reflect.Pointer && field.Elem().Kind() == reflect.Struct
		if nested && !bytes.Equal(keys[key], []byte("null")) {
			if err := knownKeys(path+key+".", keys[key], field.Elem()); err != nil {
				return err
			}
		}
	}
	return nil
}

// misplaced are keys that people will try, and what to do instead. Anybody may
// read a stanza, and the runtime keeps a copy of it for each pod.
var misplaced = map[string]string{
	"clusterSecret":     "write the secret into a file of mode 0600 and name that in clusterSecretFile",
	"registry.password": "write the password into a file of mode 0600 and name that in registry.passwordFile",
}

func unknownKey(path, key string, known map[string]reflect.Type) error {
	if want, ok := misplaced[path+key]; ok {
		return &Error{path + key, "no such key, and no place for a secret", want}
	}
	names := slices.Sorted(maps.Keys(known))
	nearest := slices.MinFunc(names, func(a, b string) int {
		distance := func(s string) int {
			return levenshtein.ComputeDistance(strings.ToLower(s), strings.ToLower(key))
		}
		return distance(a) - distance(b)
	})
	return &Error{path + key, "no such key", fmt.Sprintf("did you mean %q?", path+nearest)}
}
