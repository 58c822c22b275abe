"""Class names that datasets' own files don't hold: countries by ISO 3166 code, and what German traffic signs say."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_COUNTRIES = """
AD Andorra | AE United Arab Emirates | AF Afghanistan | AG Antigua and Barbuda | AI Anguilla | AL Albania | AM Armenia
AO Angola | AQ Antarctica | AR Argentina | AS American Samoa | AT Austria | AU Australia | AW Aruba | AX Aland Islands
AZ Azerbaijan | BA Bosnia and Herzegovina | BB Barbados | BD Bangladesh | BE Belgium | BF Burkina Faso | BG Bulgaria
BH Bahrain | BI Burundi | BJ Benin | BL Saint Barthelemy | BM Bermuda | BN Brunei | BO Bolivia
BQ Bonaire, Sint Eustatius and Saba | BR Brazil | BS Bahamas | BT Bhutan | BV Bouvet Island | BW Botswana | BY Belarus
BZ Belize | CA Canada | CC Cocos Islands | CD DR Congo | CF Central African Republic | CG Republic of the Congo
CH Switzerland | CI Cote d'Ivoire | CK Cook Islands | CL Chile | CM Cameroon | CN China | CO Colombia | CR Costa Rica
CU Cuba | CV Cabo Verde | CW Curacao | CX Christmas Island | CY Cyprus | CZ Czech Republic | DE Germany | DJ Djibouti
DK Denmark | DM Dominica | DO Dominican Republic | DZ Algeria | EC Ecuador | EE Estonia | EG Egypt | EH Western Sahara
ER Eritrea | ES Spain | ET Ethiopia | FI Finland | FJ Fiji | FK Falkland Islands | FM Micronesia | FO Faeroe Islands
FR France | GA Gabon | GB United Kingdom | GD Grenada | GE Georgia | GF French Guiana | GG Guernsey | GH Ghana
GI Gibraltar | GL Greenland | GM Gambia | GN Guinea | GP Guadeloupe | GQ Equatorial Guinea | GR Greece
GS South Georgia and South Sandwich Islands | GT Guatemala | GU Guam | GW Guinea-Bissau | GY Guyana | HK Hong Kong
HM Heard Island and McDonald Islands | HN Honduras | HR Croatia | HT Haiti | HU Hungary | ID Indonesia | IE Ireland
IL Israel | IM Isle of Man | IN India | IO British Indian Ocean Territory | IQ Iraq | IR Iran | IS Iceland | IT Italy
JE Jersey | JM Jamaica | JO Jordan | JP Japan | KE Kenya | KG Kyrgyzstan | KH Cambodia | KI Kiribati | KM Comoros
KN Saint Kitts and Nevis | KP North Korea | KR South Korea | KW Kuwait | KY Cayman Islands | KZ Kazakhstan | LA Laos
LB Lebanon | LC Saint Lucia | LI Liechtenstein | LK Sri Lanka | LR Liberia | LS Lesotho | LT Lithuania | LU Luxembourg
LV Latvia | LY Libya | MA Morocco | MC Monaco | MD Moldova | ME Montenegro | MF Saint Martin | MG Madagascar
MH Marshall Islands | MK North Macedonia | ML Mali | MM Myanmar | MN Mongolia | MO Macau | MP Northern Mariana Islands
MQ Martinique | MR Mauritania | MS Montserrat | MT Malta | MU Mauritius | MV Maldives | MW Malawi | MX Mexico
MY Malaysia | MZ Mozambique | NA Namibia | NC New Caledonia | NE Niger | NF Norfolk Island | NG Nigeria | NI Nicaragua
NL Netherlands | NO Norway | NP Nepal | NR Nauru | NU Niue | NZ New Zealand | OM Oman | PA Panama | PE Peru
PF French Polynesia | PG Papua New Guinea | PH Philippines | PK Pakistan | PL Poland | PM Saint Pierre and Miquelon
PN Pitcairn | PR Puerto Rico | PS Palestine | PT Portugal | PW Palau | PY Paraguay | QA Qatar | RE Reunion | RO Romania
RS Serbia | RU Russia | RW Rwanda | SA Saudi Arabia | SB Solomon Islands | SC Seychelles | SD Sudan | SE Sweden
SG Singapore | SH Saint Helena | SI Slovenia | SJ Svalbard and Jan Mayen | SK Slovakia | SL Sierra Leone
SM San Marino | SN Senegal | SO Somalia | SR Suriname | SS South Sudan | ST Sao Tome and Principe | SV El Salvador
SX Sint Maarten | SY Syria | SZ Eswatini | TC Turks and Caicos Islands | TD Chad | TF French Southern Territories
TG Togo | TH Thailand | TJ Tajikistan | TK Tokelau | TL Timor-Leste | TM Turkmenistan | TN Tunisia | TO Tonga
TR Turkey | TT Trinidad and Tobago | TV Tuvalu | TW Taiwan | TZ Tanzania | UA Ukraine | UG Uganda
UM United States Minor Outlying Islands | US United States | UY Uruguay | UZ Uzbekistan | VA Vatican
VC Saint Vincent and the Grenadines | VE Venezuela | VG British Virgin Islands | VI US Virgin Islands | VN Vietnam
VU Vanuatu | WF Wallis and Futuna | WS Samoa | XK Kosovo | YE Yemen | YT Mayotte | ZA South Africa | ZM Zambia
ZW Zimbabwe
"""

COUNTRIES: Mapping[str, str] = MappingProxyType(
    {entry[:2]: entry[3:] for entry in _COUNTRIES.strip().replace("\n", " | ").split(" | ")}
)
"""Short English country names by ISO 3166-1 alpha-2 code (and XK): all of them, of which Country211 uses some."""

GTSRB_NAMES: Mapping[str, str] = MappingProxyType(
    {
        f"{label:05d}": name
        for label, name in enumerate(
            (
                *(f"speed limit {limit} km/h" for limit in (20, 30, 50, 60, 70, 80)),
                "end of speed limit 80 km/h",
                "speed limit 100 km/h",
                "speed limit 120 km/h",
                "no overtaking",
                "no overtaking for trucks",
                "right of way at the next crossing",
                "priority road",
                "give way",
                "stop",
                "no vehicles",
                "no trucks",
                "no entry",
                "danger",
                "curve to the left",
                "curve to the right",
                "double curve",
                "bumpy road",
                "slippery road",
                "road narrows on the right",
                "road works",
                "traffic lights ahead",
                "pedestrians",
                "children crossing",
                "bicycles crossing",
                "snow or ice",
                "wild animals crossing",
                "end of all limits",
                "turn right ahead",
                "turn left ahead",
                "straight ahead only",
                "straight ahead or right",
                "straight ahead or left",
                "keep right",
                "keep left",
                "roundabout",
                "end of no overtaking",
                "end of no overtaking for trucks",
            )
        )
    }
)
"""What the 43 signs say, by class folder, in our words."""
